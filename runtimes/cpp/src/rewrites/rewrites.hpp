// What makes the graphs of a bundle fast on ONNX Runtime's CPU: one file per rewrite, applied when a graph is loaded.
//
// For the step graph either all of them apply, and it takes one patch at a time from a caller that looks its rows up,
// or none does and the portable graph runs as it is. Formulas and patterns are those of tarflow_runtimes/_rewrites, so
// that both runtimes run the same graphs and draw the same bits.
#pragma once

#include <string>
#include <vector>

#include "../bundle.hpp"
#include "graph.hpp"

namespace tarflow::detail {

/// What a step graph is rewritten for: G branches of guidance, a temperature that is not 1, windows of one image.
struct StepKind {
  std::int64_t branches = 1;
  bool temperature = false;
  bool windows = false;
};

/// The ending of the names of the second branch's caches where a graph takes windows.
constexpr const char* kNullBranch = "_null";

/// The initializers that the caller looks rows up in; `class_embed` is empty on models without classes.
struct EmbeddingTables {
  onnx::Tensor pos_embed;
  onnx::Tensor class_embed;
};

void rewrite_attention(Graph& graph, const Config& config, const StepKind& kind);
EmbeddingTables rewrite_sequential_input(Graph& graph, const Config& config);
void rewrite_sequential_output(Graph& graph, const Config& config, const StepKind& kind);

/// A serialised step graph for one patch at a time, or for S patches of one image with `windows`.
struct SequentialGraph {
  std::string model;
  EmbeddingTables tables;
};

/// Rewrite the portable step graph. Throws PatternMismatch when it is not of the form that the rewrites know.
SequentialGraph sequential_graph(const onnx::Model& model, const Config& config, const StepKind& kind);

/// Two serialised graphs: patches, labels -> z and `saved`; `saved`, cotangent -> gradient.
struct SplitGradient {
  std::string forward, backward;
  std::vector<std::string> saved;
};

/// Cut a float32 gradient graph where the cotangent comes in. Throws PatternMismatch when z cannot be had from what the
/// way back reads, as in blocks without a scale.
SplitGradient split_gradient(const onnx::Model& model);

}  // namespace tarflow::detail
