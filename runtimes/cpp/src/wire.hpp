// The wire format of protocol buffers: fields as they follow each other in a message, read and written.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tarflow::detail::wire {

struct Malformed : std::runtime_error {
  Malformed() : std::runtime_error("malformed or cut off") {}
};

enum : std::uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

struct Field {
  std::uint32_t number = 0, type = 0;
  std::uint64_t integer = 0;  // of a varint, fixed32 or fixed64
  std::string_view bytes;     // of a string, bytes, message or packed list
  std::string_view whole;     // the field with its tag

  float real() const {
    const auto word = static_cast<std::uint32_t>(integer);
    float value = 0.0F;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  std::string text() const { return std::string(bytes); }
};

/// Reads a message field by field; throws Malformed.
class Reader {
 public:
  explicit Reader(std::string_view message) : left_(message) {}
  bool at_end() const { return left_.empty(); }
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<std::uint8_t>(take(1)[0]);
      value |= std::uint64_t{byte & 0x7FU} << shift;
      if (byte < 0x80) return value;
    }
    throw Malformed();
  }
  std::uint64_t fixed(std::size_t size) {
    const std::string_view bytes = take(size);
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < size; ++i)
      value |= std::uint64_t{static_cast<std::uint8_t>(bytes[i])} << (8 * i);
    return value;
  }
  bool next(Field& field) {
    if (left_.empty()) return false;
    const char* start = left_.data();
    const std::uint64_t tag = varint();
    field = Field{};
    field.number = static_cast<std::uint32_t>(tag >> 3);
    field.type = static_cast<std::uint32_t>(tag & 7);
    if (tag >> 32 != 0 || field.number == 0) throw Malformed();
    switch (field.type) {
      case kVarint: field.integer = varint(); break;
      case kFixed64: field.integer = fixed(8); break;
      case kFixed32: field.integer = fixed(4); break;
      case kBytes: field.bytes = take(varint()); break;
      default: throw Malformed();  // groups, which ONNX does not have
    }
    field.whole = std::string_view(start, static_cast<std::size_t>(left_.data() - start));
    return true;
  }

 private:
  std::string_view take(std::uint64_t size) {
    if (size > left_.size()) throw Malformed();
    const std::string_view taken = left_.substr(0, static_cast<std::size_t>(size));
    left_.remove_prefix(static_cast<std::size_t>(size));
    return taken;
  }
  std::string_view left_;
};

inline void put_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

inline void put_integer(std::string& out, std::uint32_t number, std::int64_t value) {
  put_varint(out, number << 3 | kVarint);
  put_varint(out, static_cast<std::uint64_t>(value));
}

inline void put_bytes(std::string& out, std::uint32_t number, std::string_view bytes) {
  put_varint(out, number << 3 | kBytes);
  put_varint(out, bytes.size());
  out.append(bytes);
}

inline void put_float(std::string& out, std::uint32_t number, float value) {
  put_varint(out, number << 3 | kFixed32);
  std::uint32_t word = 0;
  std::memcpy(&word, &value, sizeof word);
  for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<char>(word >> shift));
}

}  // namespace tarflow::detail::wire
