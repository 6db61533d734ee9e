#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace fasttrain {
namespace {

bool cpu_has(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::scalar || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  return isa == Isa::scalar;
#endif
}

Isa best_isa() {
  if (cpu_has(Isa::avx512)) return Isa::avx512;
  if (cpu_has(Isa::avx2)) return Isa::avx2;
  return Isa::scalar;
}

std::atomic<int> chosen{-1};  // -1: not asked for yet
std::atomic<bool> vnni_allowed{true};

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
    if (cpu_has(isa)) names.emplace_back(isa_name(isa));
  return names;
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) chosen.store(isa = static_cast<int>(best_isa()), std::memory_order_relaxed);
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (name != isa_name(isa)) continue;
    if (!cpu_has(isa)) throw std::invalid_argument("this CPU cannot run instruction set '" + name + "'");
    chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown; it must be scalar, avx2 or avx512");
}

bool uses_vnni() {
#if defined(__x86_64__)
  if (!vnni_allowed.load(std::memory_order_relaxed)) return false;
  if (current_isa() == Isa::avx512) return __builtin_cpu_supports("avx512vnni");
  if (current_isa() == Isa::avx2) return __builtin_cpu_supports("avxvnni");
#endif
  return false;
}

void allow_vnni(bool allowed) { vnni_allowed.store(allowed, std::memory_order_relaxed); }

}  // namespace fasttrain
