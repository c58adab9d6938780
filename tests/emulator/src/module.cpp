// The Python module of one build: the functions of _C.cuda, compiled for the CPU, and beside them, as .emulator, the
// emulator's settings and what it has seen.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "emulator/counters.h"
#include "emulator/machine.h"
#include "emulator/sites.h"
#include "emulator/symbols.h"
#include "runtime_bindings.h"

namespace py = pybind11;

namespace emulator {
namespace {

Order order_of(const std::string& name) {
  if (name == "in order") return Order::kInOrder;
  if (name == "reverse") return Order::kReverse;
  if (name == "random") return Order::kRandom;
  throw std::invalid_argument("order must be 'in order', 'reverse' or 'random', not '" + name + "'");
}

CopyTime copy_time_of(const std::string& name) {
  if (name == "late") return CopyTime::kLate;
  if (name == "early") return CopyTime::kEarly;
  if (name == "random") return CopyTime::kRandom;
  throw std::invalid_argument("copy_time must be 'late', 'early' or 'random', not '" + name + "'");
}

void configure(const std::string& order, uint64_t seed, const std::string& copy_time, bool check_races,
               bool count_accesses, bool allow_sm90_shared,
               const std::vector<std::tuple<std::string, std::string, int>>& dropped) {
  if ((check_races || count_accesses) && !HMI_EMULATOR_OBSERVES) {
    throw std::invalid_argument("this build does not observe memory accesses; use the variant 'race' or 'count'");
  }
  Settings settings{order_of(order), seed, copy_time_of(copy_time), check_races, count_accesses, allow_sm90_shared, {}};
  for (const auto& [kind, file, line] : dropped) settings.dropped.push_back({kind, file, line});
  machine.settings = settings;
  reset_sites();
  forget_counters();
}

py::dict traffic(const GlobalTraffic& global) {
  py::dict result;
  result["sector_bytes"] = global.sector_bytes;
  result["block_bytes"] = global.block_bytes;
  result["distinct_bytes"] = global.distinct_bytes;
  return result;
}

py::list counters() {
  py::list launches;
  for (const LaunchCounters& launch : launch_counters()) {
    py::dict shared;
    for (const auto& [code, site] : launch.shared) {
      shared[py::int_(code)] = py::make_tuple(site.requests, site.wavefronts, site.fewest, site.worst_degree);
    }
    py::dict result;
    result["kernel"] = launch.kernel;
    result["blocks"] = launch.blocks;
    result["reads"] = traffic(launch.reads);
    result["writes"] = traffic(launch.writes);
    result["shared"] = shared;
    result["global_sector_bytes"] = launch.global_sector_bytes;
    launches.append(result);
  }
  return launches;
}

py::list sites() {
  py::list used;
  for (const Site& site : used_sites()) {
    used.append(py::make_tuple(site.kind, short_path(site.place.file), site.place.line, site.count));
  }
  return used;
}

void define_emulator(py::module_& m) {
  m.def("configure", &configure, py::kw_only(), py::arg("order"), py::arg("seed"), py::arg("copy_time"),
        py::arg("check_races"), py::arg("count_accesses"), py::arg("allow_sm90_shared"), py::arg("dropped"));
  m.def("counters", &counters);
  m.def("forget_counters", &forget_counters);
  m.def("sites", &sites);
  m.def("places_of", &places_of, py::arg("codes"));
  m.def("function_at", &function_at, py::arg("code"));
  m.def("switches", [] { return machine.switches; });
}

}  // namespace
}  // namespace emulator

PYBIND11_MODULE(HMI_EMULATOR_MODULE, m) {
  hmi::bindings::define_cuda(m);
  py::module_ controls = m.def_submodule("emulator");
  emulator::define_emulator(controls);
  emulator::define_runtime(controls);
}
