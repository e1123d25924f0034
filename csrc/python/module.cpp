// The Python module. Bindings of each part live in their own file here.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_engine(nb::module_& m);
void bind_codec(nb::module_& m);
void bind_node(nb::module_& m);
void bind_spsa(nb::module_& m);

NB_MODULE(_core, m) {
  m.doc() = "decotrain's collective core";
#ifdef NDEBUG
  // A process that ends by an exception still holds objects of ours: nothing its user could mend.
  nb::set_leak_warnings(false);
#endif
  bind_engine(m);
  bind_codec(m);
  bind_node(m);
  bind_spsa(m);
}
