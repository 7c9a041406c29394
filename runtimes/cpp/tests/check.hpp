// The tests' one tool: CHECK counts and prints what is false, and the program goes on; main returns finish().
#pragma once

#include <cstdio>
#include <cstring>

#include "tarflow/tarflow.hpp"

inline int failures = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failures;                                                          \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                      \
  } while (false)

/// A failed call: its code, these words in its message, and a hint where one is promised.
#define CHECK_FAILS(call, expected, words)                                                                       \
  do {                                                                                                           \
    const tarflow_status status_ = (call);                                                                       \
    if (status_ != (expected) || std::strstr(tarflow_last_message(), words) == nullptr) {                        \
      ++failures;                                                                                                \
      std::fprintf(stderr, "%s:%d: %s: expected %s with '%s', got %s with '%s'\n", __FILE__, __LINE__, #call,    \
                   tarflow_status_name(expected), words, tarflow_status_name(status_), tarflow_last_message()); \
    }                                                                                                            \
  } while (false)

/// A model on an engine, of the command line.
inline tarflow::Model open_on(const std::string& engine, const std::string& bundle) {
  tarflow::Model::Options options;
  options.engine = engine;
  return {bundle, options};
}

/// Runs the tests; what they throw is a failure.
template <typename Tests>
int finish(Tests tests) {
  try {
    tests();
  } catch (const tarflow::Error& error) {
    ++failures;
    std::fprintf(stderr, "%s (%s)\n", error.what(), error.hint().c_str());
  } catch (const std::exception& error) {
    ++failures;
    std::fprintf(stderr, "%s\n", error.what());
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
