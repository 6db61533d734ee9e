// A few threads that do pieces of one piece of work and meet many times in it, microseconds apart. They are PyTorch's
// own: threads of another pool would fight with those for the cores, which spin for milliseconds after each of its
// operations (`python -m bench.bench_generate --parts penalties`: there Python looks at the logits after each token).
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasttrain {

// Whether this process was forked after it had loaded this library, or whether that cannot be noted. Noted and not found
// out by getpid(), which is a system call in every run.
inline bool is_forked = pthread_atfork(nullptr, nullptr, [] { is_forked = true; }) != 0;

class ThreadTeam {
 public:
  explicit ThreadTeam(int size) : size_(size) {}
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return size_; }

  // Runs work(i) for every i < size(), all of them at once, and returns when all are done. `work` must not throw.
  void run(const std::function<void(int)>& work) {
    if (is_forked) return run_several(0, size_, work);  // after a fork PyTorch's threads are the parent's
    torch::stable::parallel_for(0, size_, 1, [&](std::int64_t begin, std::int64_t end) {
      run_several(static_cast<int>(begin), static_cast<int>(end), work);
    });
  }

  // Returns when `value` is no longer `old`.
  static void wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }

  // Inside `work`: nobody goes on before everybody is here.
  void barrier() {
    if (size_ == 1) return;
    const std::uint32_t now = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(now + 1, std::memory_order_release);
      phase_.notify_all();
    } else {
      wait_for_change(phase_, now);
    }
  }

 private:
  static constexpr int kSpins = 20000;  // some 200 microseconds; then the kernel is asked

  // PyTorch gives a thread several parts where it has fewer threads: those that are missing are started for the moment.
  static void run_several(int begin, int end, const std::function<void(int)>& work) {
    std::vector<std::thread> missing;
    for (int i = begin + 1; i < end; ++i) missing.emplace_back([&work, i] { work(i); });
    work(begin);
    for (std::thread& thread : missing) thread.join();
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int size_;
  std::atomic<std::uint32_t> phase_{0};
  std::atomic<int> arrived_{0};
};

}  // namespace fasttrain
