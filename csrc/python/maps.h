// Reports, plans and views as Python maps: the layout is in docs/protocol.md ("Report and plan as
// maps"). What comes from Python came from the network: a map that breaks the layout is a
// ValueError.
#pragma once

#include <nanobind/nanobind.h>

#include "engine.h"

namespace decotrain {

nanobind::dict to_map(const Report& report);
nanobind::dict to_map(const View& view);
Install install_from_map(const nanobind::dict& map);

}  // namespace decotrain
