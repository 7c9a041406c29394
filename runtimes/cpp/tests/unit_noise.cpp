// What the library does not export: Philox, the seeded normals and SHA-256, against published and committed values;
// and what is kept of things that are costly to make.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "check.hpp"
#include "noise.hpp"
#include "recent.hpp"
#include "sha256.hpp"

using tarflow::detail::Words;

static std::string digest(const void* data, std::size_t size) {
  tarflow::detail::Sha256 hash;
  hash.update(data, size);
  return hash.finish();
}

static std::uint32_t bits(float value) {
  std::uint32_t word = 0;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

static void test_noise() {
  using tarflow::detail::philox;
  CHECK((philox({0, 0, 0, 0}, 0, 0) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((philox({~0U, ~0U, ~0U, ~0U}, ~0U, ~0U) == Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0) ==
         Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  float nine[9];
  CHECK(tarflow_noise(0x0123456789abcdefULL, (1ULL << 32) + 5, 1, 3, 3, nine) == TARFLOW_OK);
  const std::uint32_t expected[] = {0x3ea2377b, 0xbf100ab7, 0x3de7df53, 0xbf327093, 0x400209bb,
                                    0x3fa8f1ec, 0x3eaffd42, 0xbc466731, 0x3ed456ea};
  for (int i = 0; i < 9; ++i) CHECK(bits(nine[i]) == expected[i]);
  std::vector<float> four(4 * 49 * 16);
  CHECK(tarflow_noise(7, 0, 4, 49, 16, four.data()) == TARFLOW_OK);
  CHECK(digest(four.data(), 4 * four.size()) == "450ea589e823a3e25e5aeddf0aaccacc5d11476f06ac8cde3ebd9ffb547633df");
}

static void test_sha256() {
  CHECK(digest("", 0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(digest("abc", 3) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string million(1000000, 'a');
  CHECK(digest(million.data(), million.size()) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

/// The one used longest ago goes, before another is made; who holds it keeps it.
static void test_recent() {
  tarflow::detail::Recent<int, const int> recent(2);
  int made = 0;
  const auto get = [&](int key) {
    return recent.get(key, [&] { return std::make_shared<const int>(10 * ++made + key); });
  };
  const std::shared_ptr<const int> first = get(1);
  const std::weak_ptr<const int> second = get(2);
  CHECK(*first == 11 && *second.lock() == 22 && get(1) == first && made == 2);
  recent.get(3, [&] {
    CHECK(second.expired());
    return std::make_shared<const int>(3);
  });
  CHECK(get(1) == first && *get(2) == 32 && *get(3) == 43 && *first == 11 && *get(1) == 51);
}

int main() {
  return finish([] {
    test_recent();
    test_noise();
    test_sha256();
  });
}
