// A few threads that do short pieces of work one after the other, microseconds apart: they wait spinning at first, and
// asleep when nothing comes. The caller is thread 0. Many barriers a token are too many for a pool that wakes its
// threads through the kernel each time.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fasttrain {

class ThreadTeam {
 public:
  explicit ThreadTeam(int size) : size_(size) {
    for (int i = 1; i < size; ++i) workers_.emplace_back([this, i] { serve(i); });
  }
  ~ThreadTeam() {
    if (getpid() != owner_) {  // a forked child has this object but none of its threads
      for (std::thread& worker : workers_) worker.detach();
      return;
    }
    work_ = nullptr;
    announce();
    for (std::thread& worker : workers_) worker.join();
  }
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return size_; }

  // Runs work(i) on every thread i and returns when all are done. `work` must not throw.
  void run(const std::function<void(int)>& work) {
    if (getpid() != owner_) throw std::runtime_error("a decoder made before a fork cannot run in the child; make it anew there");
    work_ = &work;
    announce();
    work(0);
    barrier();
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

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  static void wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  }

  void announce() {
    task_.fetch_add(1, std::memory_order_release);
    task_.notify_all();
  }

  void serve(int index) {
    for (std::uint32_t seen = 0;; ++seen) {
      wait_for_change(task_, seen);
      if (work_ == nullptr) return;
      (*work_)(index);
      barrier();
    }
  }

  const int size_;
  const pid_t owner_ = getpid();
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<std::uint32_t> task_{0}, phase_{0};
  std::atomic<int> arrived_{0};
  std::vector<std::thread> workers_;
};

}  // namespace fasttrain
