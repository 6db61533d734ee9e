// Which instruction set the kernels run: decided once from the CPU, changeable for tests and A/B runs.
#pragma once

#include <string>
#include <vector>

namespace fasttrain {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);
std::vector<std::string> available_isas();  // those this CPU can run, slowest first
Isa current_isa();
void set_isa(const std::string& name);  // std::invalid_argument if this CPU cannot run it

// VNNI (AVX512-VNNI, AVX-VNNI): whether the CPU has it for the current set, and it is not forbidden.
bool uses_vnni();
void allow_vnni(bool allowed);

}  // namespace fasttrain
