// What this machine can do at most, of the instructions it was compiled for: ceilings THREADS, as JSON.
//
// fma: chains of fused multiply-adds that stay in registers, GFLOP/s. l3, dram: sums over 8 MB and 256 MB, cut over the
// threads, GB/s read. Each is the fastest of a few repetitions: a ceiling is what nothing disturbed. Each thread has a
// processor of its own. For Linux.

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kChains = 24;  // of 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32;
constexpr int kChains = 12;  // of 16
#else
constexpr int kBytes = 16;
constexpr int kChains = 12;
#endif
constexpr int kLanes = kBytes / sizeof(float);
typedef float Lanes __attribute__((vector_size(kBytes)));

volatile float sink;

void fma(long count) {
    const Lanes factor = Lanes{} + 0.999f, term = Lanes{} + 0.001f;
    Lanes chains[kChains];
    for (int chain = 0; chain < kChains; ++chain) chains[chain] = Lanes{} + static_cast<float>(chain);
    for (long i = 0; i < count; ++i)
#pragma GCC unroll 24
        for (int chain = 0; chain < kChains; ++chain) chains[chain] = chains[chain] * factor + term;
    for (const Lanes& chain : chains) sink = chain[0];
}

void read(const Lanes* from, std::size_t count) {
    Lanes sums[8] = {};
    for (std::size_t i = 0; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (int sum = 0; sum < 8; ++sum) sums[sum] += from[i + sum];
    for (const Lanes& sum : sums) sink = sum[0];
}

// Binds the calling thread to processor `index` of those that this process may use.
void bind(int index, cpu_set_t usable) {
    int processor = 0;
    while (!CPU_ISSET(processor, &usable) || index-- > 0) ++processor;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    sched_setaffinity(0, sizeof one, &one);
}

double fastest(int threads, const std::function<void(int)>& work) {
    using Clock = std::chrono::steady_clock;
    static const cpu_set_t usable = [] {
        cpu_set_t set;
        sched_getaffinity(0, sizeof set, &set);
        return set;
    }();
    const auto bound = [&](int thread) {
        bind(thread, usable);
        work(thread);
    };
    double best = 1e30;
    for (int repetition = 0; repetition < 15; ++repetition) {
        const auto begin = Clock::now();
        std::vector<std::thread> others;
        for (int thread = 1; thread < threads; ++thread) others.emplace_back(bound, thread);
        bound(0);
        for (std::thread& other : others) other.join();
        best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
    }
    return best;
}

double gigabytes(int threads, std::size_t megabytes, int passes) {
    const std::vector<Lanes> memory(megabytes * 1000000 / kBytes);
    const std::size_t share = memory.size() / threads;
    const double seconds = fastest(threads, [&](int thread) {
        for (int pass = 0; pass < passes; ++pass) read(memory.data() + thread * share, share);
    });
    return 1e-3 * megabytes * passes / seconds;
}

}  // namespace

int main(int, char** arguments) {
    const int threads = std::atoi(arguments[1]);
    const long count = 4000000;
    const double operations = 2e-9 * threads * kChains * kLanes * count;
    const double gflops = operations / fastest(threads, [](int) { fma(count); });
    std::printf("{\"fma_gflops\": %.1f, \"l3_gbs\": %.1f, \"dram_gbs\": %.1f}\n", gflops, gigabytes(threads, 8, 256),
                gigabytes(threads, 256, 1));
}
