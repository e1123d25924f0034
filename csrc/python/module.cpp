// The Python module. Bindings of each part live in their own file here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_core, m) { m.doc() = "decotrain's collective core"; }
