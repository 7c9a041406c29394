// Plans: strategies, reports, and the files that `tarflow tune` writes: unit_plans BUNDLE FOLDER
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "check.hpp"
#include "tuned.hpp"

namespace fs = std::filesystem;
using Json = nlohmann::json;
using tarflow::Strategy;

namespace {

void save(const fs::path& path, const Json& document) { std::ofstream(path) << document.dump(); }

void test_report(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  CHECK(sampler.report().blocks.empty());
  tarflow::SampleOptions options;
  options.seed = 4;
  options.batch_size = 2;
  options.plan.assign(static_cast<std::size_t>(model.config().blocks), Strategy::sequential());
  options.plan[1] = {true, 8, 1e-3, true};
  sampler.sample(3, {0, 1, 2}, options);
  const tarflow::Report report = sampler.report();
  const std::int64_t steps = model.config().patches - 1;
  CHECK(static_cast<std::int64_t>(report.blocks.size()) == model.config().blocks && report.non_finite.empty());
  for (const tarflow::BlockReport& block : report.blocks) {
    CHECK(block.calls.size() == 3 && block.sequential_images.empty());
    CHECK(block.strategy.parallel == (block.block == 1));
    if (!block.strategy.parallel) {
      CHECK(block.calls == std::vector<std::int64_t>(3, steps) && block.committed.empty() && block.residual == 0.0);
      continue;
    }
    CHECK(block.strategy.window == 8 && block.strategy.tolerance == 1e-3 && block.strategy.from_zeros);
    CHECK(block.residual > 0.0 && block.residual <= 1.0001e-3 && block.committed.size() == 3);
    for (std::size_t image = 0; image < block.committed.size(); ++image) {
      std::int64_t sum = 0;
      for (const std::int64_t settled : block.committed[image]) sum += settled;
      CHECK(sum == steps && static_cast<std::int64_t>(block.committed[image].size()) == block.calls[image]);
    }
  }
  // Windows within a tolerance are near the sequential answer; progress counts the steps of all blocks.
  options.plan = {Strategy{true, 0, 1e-6, false}};
  tarflow_step last{};
  options.on_step = [&](const tarflow_step& step) {
    CHECK(step.step > last.step);
    last = step;
    return true;
  };
  const std::vector<float> images = sampler.sample(2, {3, 4}, options);
  CHECK(last.step == last.total && last.total == model.config().blocks * steps && last.block == 0);
  options.on_step = nullptr;
  options.plan.clear();
  const std::vector<float> expected = sampler.sample(2, {3, 4}, options);
  for (std::size_t i = 0; i < images.size(); ++i) CHECK(std::fabs(images[i] - expected[i]) < 1e-3F);
}

void test_refused(const tarflow::Model& model) {
  tarflow::Sampler sampler(model);
  const auto refused = [&](const std::vector<Strategy>& plan) {
    tarflow::SampleOptions options;
    options.plan = plan;
    try {
      sampler.sample(1, {}, options);
      return false;
    } catch (const tarflow::Error& error) {
      return error.code() == TARFLOW_ERROR_INPUT;
    }
  };
  CHECK(refused({{}, {}}));
  CHECK(refused({{true, -1, 1e-5, false}}));
  CHECK(refused({{true, 0, -1.0, false}}));
  CHECK(refused({{true, 0, std::nan(""), false}}));
}

void test_tuned(const std::string& bundle, const fs::path& folder) {
  tarflow::detail::load_ort("");
  const tarflow::detail::Engine engine(tarflow::detail::open_bundle(bundle, false), {});
  const Json parallel = {{"decode", "parallel"}, {"window", 4}, {"tolerance", 1e-4}, {"init", "zeros"}};
  const Json sequential = {{"decode", "sequential"}};
  const auto entry = [&](std::int64_t batch, std::int64_t branches, const Json& first) {
    return Json{{"identity", tarflow::detail::identity_of(engine)}, {"batch", batch}, {"branches", branches},
                {"seconds", 1.0}, {"sequential_seconds", 2}, {"plan", {first, sequential, sequential, sequential}}};
  };
  const fs::path file = folder / "x.plans.json";
  const Json good = {{"schema_version", 1}, {"plans", {entry(16, 1, sequential), entry(4, 1, parallel)}}};
  save(file, good);
  const tarflow::detail::TunedPlans plans = tarflow::detail::read_plans(file, engine);
  CHECK(plans.entries.size() == 2 && plans.reason.empty());
  CHECK(plans.plan(3, 1, 4).size() == 4 && plans.plan(3, 1, 4)[0].parallel && plans.plan(3, 1, 4)[0].window == 4);
  CHECK(plans.plan(3, 1, 4)[0].tolerance == 1e-4 && plans.plan(3, 1, 4)[0].from_zeros);
  CHECK(plans.plan(5, 1, 4).size() == 4 && !plans.plan(5, 1, 4)[0].parallel);
  CHECK(plans.plan(17, 1, 4).empty() && plans.plan(3, 2, 4).empty() && plans.plan(3, 1, 5).empty());

  // Through the C ABI: the plan is taken, its tolerance may be replaced, and where there is none the log says so.
  std::vector<std::string> heard;
  tarflow::Model::Options options;
  options.on_log = [&](tarflow_log_level level, const char* text) {
    if (level == TARFLOW_LOG_WARNING) heard.emplace_back(text);
  };
  const tarflow::Model model(bundle, options);
  tarflow::Sampler sampler(model);
  tarflow::SampleOptions sample;
  sample.tuned = tarflow::TunedPlans{file.string(), std::nullopt};
  sampler.sample(2, {}, sample);
  CHECK(sampler.report().blocks.back().strategy.window == 4);
  CHECK(sampler.report().blocks.back().strategy.tolerance == 1e-4);
  CHECK(heard.empty());
  sample.tuned->tolerance = 1e-2;
  sampler.sample(2, {}, sample);
  CHECK(sampler.report().blocks.back().strategy.tolerance == 1e-2);
  Json other = good;
  for (Json& one : other["plans"]) one["identity"]["device"] = "another";
  save(file, other);
  sampler.sample(1, {}, sample);
  CHECK(heard.size() == 1 && heard[0].find("was tuned for another device") != std::string::npos);
  sample.tuned->file = (folder / "nowhere.json").string();
  sampler.sample(1, {}, sample);
  CHECK(heard.size() == 2 && heard[1].find("does not exist") != std::string::npos);

  const auto damaged = [&](const Json& document) {
    save(file, document);
    try {
      tarflow::detail::read_plans(file, engine);
      std::fprintf(stderr, "not refused: %s\n", document.dump().c_str());
      ++failures;
    } catch (const std::runtime_error& error) {
      CHECK(std::strstr(error.what(), "not a file of tuned plans") != nullptr);
    }
  };
  damaged(Json::array());
  damaged({{"schema_version", 2}, {"plans", Json::array()}});
  damaged({{"schema_version", 1}});
  for (const auto& [field, value] : std::vector<std::pair<const char*, Json>>{
           {"batch", "16"}, {"plan", 3}, {"seconds", nullptr}, {"identity", Json::array()},
           {"plan", {{{"decode", "parallel"}, {"window", -1}}}}, {"plan", {{{"decode", "other"}}}},
           {"plan", {{{"decode", "parallel"}, {"speed", 1}}}},
           {"plan", {{{"decode", "parallel"}, {"tolerance", -1.0}}}}}) {
    Json document = good;
    document["plans"][0][field] = value;
    damaged(document);
  }
  std::ofstream(file) << "{";
  CHECK_FAILS([&] {
    tarflow_sample_options given;
    tarflow_sample_options_init(&given);
    given.decode = TARFLOW_DECODE_AUTO;
    const std::string name = file.string();
    given.plans_file = name.c_str();
    std::vector<float> image(model.dims());
    tarflow_sampler* made = nullptr;
    tarflow_sampler_create(model.get(), &made);
    const tarflow_status status = tarflow_sampler_sample(made, 1, nullptr, &given, image.data(), image.size());
    tarflow_sampler_free(made);
    return status;
  }(), TARFLOW_ERROR_INPUT, "not a file of tuned plans");
  fs::remove(file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return finish([&] {
    test_tuned(argv[1], argv[2]);
    const tarflow::Model model(argv[1]);
    test_report(model);
    test_refused(model);
  });
}
