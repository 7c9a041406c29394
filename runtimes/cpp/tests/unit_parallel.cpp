// The fixed point of parallel decoding by itself, on a map made here: unit_parallel
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"
#include "decode.hpp"
#include "noise.hpp"

using namespace tarflow::detail;

namespace {

constexpr std::int64_t kValues = 3;

/// x_{i+1} = z_{i+1} exp(a) + b with a and b of a weighted sum of x_0 .. x_i, which a cache of inputs stands for.
class Toy final : public Windows {
 public:
  Toy(Floats noise, float strength, float blow_up = std::numeric_limits<float>::infinity())
      : noise_(std::move(noise)), strength_(strength), blow_up_(blow_up), cache_(noise_.size(), std::nanf("")) {}
  std::int64_t count() const { return static_cast<std::int64_t>(noise_.size()) / kValues; }
  void evaluate(std::int64_t first, const float* patches, std::int64_t length, float* next) override {
    CHECK(first <= written_);  // reads no key that was never written
    seen_.emplace_back(cache_.begin(), cache_.begin() + first * kValues);
    const Floats given(patches, patches + length * kValues);  // next may lie behind patches
    std::copy(given.begin(), given.end(), cache_.begin() + first * kValues);
    written_ = std::max(written_, first + length);
    for (std::int64_t i = 0; i < length; ++i) following(cache_, first + i, next + i * kValues);
  }
  void following(const Floats& x, std::int64_t i, float* out) const {
    for (std::int64_t value = 0; value < kValues; ++value) {
      double mean = 0.0;
      bool blown = false;
      for (std::int64_t k = 0; k <= i; ++k) {
        const auto one = static_cast<double>(x[static_cast<std::size_t>(k * kValues + value)]);
        mean += strength_ * std::pow(0.5, static_cast<double>(i - k)) * one;
        blown = blown || std::fabs(one) > static_cast<double>(blow_up_);
      }
      const auto z = static_cast<double>(noise_[static_cast<std::size_t>((i + 1) * kValues + value)]);
      out[value] = blown ? std::numeric_limits<float>::infinity()
                         : static_cast<float>(z * std::exp(std::tanh(mean)) + std::sin(mean));
    }
  }
  Floats sequential() const {
    Floats x = noise_;
    for (std::int64_t i = 0; i + 1 < count(); ++i) following(x, i, x.data() + (i + 1) * kValues);
    return x;
  }
  const std::vector<Floats>& seen() const { return seen_; }

 private:
  Floats noise_;
  float strength_, blow_up_;
  Floats cache_;
  std::vector<Floats> seen_;
  std::int64_t written_ = 0;
};

Floats draw(std::int64_t count, std::uint64_t seed) {
  Floats noise(static_cast<std::size_t>(count * kValues));
  standard_normal(seed, 0, count * kValues, noise.data());
  return noise;
}

std::int64_t sum(const std::vector<std::int64_t>& values) {
  std::int64_t total = 0;
  for (const std::int64_t value : values) total += value;
  return total;
}

Strategy parallel(std::int64_t window, double tolerance, bool from_zeros = false) {
  return {true, window, tolerance, from_zeros};
}

Settled settled(Toy& toy, const Floats& noise, const Strategy& strategy, std::vector<std::int64_t>* heard = nullptr) {
  return settle(toy, noise.data(), toy.count(), kValues, strategy, [&](std::int64_t done) {
    if (heard != nullptr) heard->push_back(done);
    return true;
  });
}

void test_laws() {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const auto count = static_cast<std::int64_t>(2 + seed * 7 % 23), window = static_cast<std::int64_t>(seed * 5 % 31);
    const Floats noise = draw(count, seed);
    // At tolerance 0 the answer is the sequential one, bit for bit, after at most N - 1 evaluations.
    Toy exact(noise, 0.05F * static_cast<float>(seed % 40));
    const Settled made = settled(exact, noise, parallel(window, 0.0, seed % 2 == 1));
    CHECK(made.patches == exact.sequential());
    CHECK(sum(made.committed) == count - 1 && static_cast<std::int64_t>(made.committed.size()) <= count - 1);
    CHECK(made.residual == 0.0 && !made.overflowed);
    // No evaluation reads a cache that is not final, and the residual is what it says.
    const double tolerance = seed % 3 == 0 ? 1e-2 : 1e-5;
    Toy toy(noise, 0.7F);
    std::vector<std::int64_t> heard;
    const Settled loose = settled(toy, noise, parallel(window, tolerance), &heard);
    for (const Floats& seen : toy.seen())
      CHECK(std::equal(seen.begin(), seen.end(), loose.patches.begin()));
    double residual = 0.0;
    for (std::int64_t i = 0; i + 1 < count; ++i) {
      float next[kValues];
      toy.following(loose.patches, i, next);
      const float* x = loose.patches.data() + (i + 1) * kValues;
      for (std::int64_t value = 0; value < kValues; ++value)
        residual = std::max<double>(residual, std::fabs(next[value] - x[value]));
    }
    CHECK(residual == loose.residual && residual <= static_cast<double>(static_cast<float>(tolerance)));
    std::int64_t done = 0;
    CHECK(heard.size() == loose.committed.size());
    for (std::size_t i = 0; i < heard.size(); ++i) CHECK(heard[i] == (done += loose.committed[i]));
  }
}

void test_overflow() {
  const Floats noise = draw(24, 0);
  const Floats finite = Toy(noise, 1.0F).sequential();
  float most = 0.0F;
  for (const float value : finite) most = std::max(most, std::fabs(value));
  Toy toy(noise, 1.0F, most + 1e-3F);
  Floats start = noise;  // the start, not the answer, is beyond what the map bears
  for (std::size_t i = 12 * kValues; i < start.size(); ++i) start[i] *= 50.0F;
  std::vector<std::int64_t> heard;
  const Settled made = settled(toy, start, parallel(0, 1e-5), &heard);
  CHECK(made.overflowed && made.patches == finite && sum(made.committed) == 23);
  CHECK(std::is_sorted(heard.begin(), heard.end()) && heard.back() == 23);
}

void test_easy_and_one() {
  const Floats noise = draw(64, 0);
  Toy easy(noise, 0.05F);
  CHECK(settled(easy, noise, parallel(0, 1e-4)).committed.size() < 8);
  Toy one(noise, 1.0F);
  const Settled made = settled(one, noise, parallel(1, 1e-5));
  CHECK(made.committed == std::vector<std::int64_t>(63, 1) && made.patches == one.sequential());
  // A caller that wants no more is not asked again.
  Toy stopped(noise, 1.0F);
  int asked = 0;
  settle(stopped, noise.data(), 64, kValues, parallel(4, 1e-5), [&](std::int64_t) { return ++asked < 3; });
  CHECK(asked == 3);
}

}  // namespace

int main() {
  return finish([] {
    test_laws();
    test_overflow();
    test_easy_and_one();
  });
}
