// Reads a golden file of golden.py: a safetensors file whose metadata hold a JSON list of cases.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

class Golden {
 public:
  using Json = nlohmann::json;

  explicit Golden(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    std::uint64_t length = 0;
    if (bytes_.size() < sizeof length) throw std::runtime_error(path + " is not a golden file");
    std::memcpy(&length, bytes_.data(), sizeof length);
    header_ = Json::parse(bytes_.substr(sizeof length, length));
    data_ = sizeof length + length;
  }
  Json cases() const { return Json::parse(header_.at("__metadata__").at("cases").get<std::string>()); }

  template <typename T>
  std::vector<T> array(const std::string& name) const {
    const Json& entry = header_.at(name);
    if (entry.at("dtype") != (sizeof(T) == 4 ? "F32" : "F64")) throw std::runtime_error(name + " has another type");
    const auto begin = entry.at("data_offsets").at(0).get<std::size_t>();
    const auto end = entry.at("data_offsets").at(1).get<std::size_t>();
    std::vector<T> values((end - begin) / sizeof(T));
    std::memcpy(values.data(), bytes_.substr(data_ + begin, end - begin).data(), end - begin);
    return values;
  }

 private:
  std::string bytes_;
  Json header_;
  std::size_t data_ = 0;
};
