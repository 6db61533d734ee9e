// The Python module fasttrain._C. Importing it registers the tensor ops (static initialisers of the op files); the
// objects with state are bound here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "adamw.h"
#include "checksums.h"
#include "decode.h"
#include "isa.h"
#include "ngram_index.h"
#include "stop_matcher.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of fasttrain: tensor ops in torch.ops.fasttrain, and stateful objects here.";
  m.def("isa", [] { return fasttrain::isa_name(fasttrain::current_isa()); }, "The instruction set in use.");
  m.def("available_isas", &fasttrain::available_isas, "Instruction sets this CPU can run, slowest first.");
  m.def("set_isa", &fasttrain::set_isa, "Use another instruction set: scalar, avx2 or avx512.");
  m.def("uses_vnni", &fasttrain::uses_vnni, "Whether products of integer weights take VNNI instructions.");
  m.def("allow_vnni", &fasttrain::allow_vnni, "Whether they may, where this CPU has them: for tests and A/B runs.");
  bind_stop_matcher(m);
  fasttrain::bind_ngram_index(m);
  fasttrain::bind_checksums(m);
  fasttrain::bind_adamw_plan(m);
  fasttrain::bind_decode(m);
}
