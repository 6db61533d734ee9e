// Sums over memory that tell whether weights are still those that were packed.
#pragma once

#include <pybind11/pybind11.h>

namespace fasttrain {

void bind_checksums(pybind11::module_& m);

}  // namespace fasttrain
