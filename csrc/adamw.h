// What module.cpp binds of csrc/adamw.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fasttrain {

void bind_adamw_plan(pybind11::module_& m);

}  // namespace fasttrain
