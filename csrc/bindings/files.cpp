// read_files: paths and numbers in, an outcome for each file out.
#include "bindings/bindings.h"
#include "common/read_files.h"

namespace hmi::bindings {
namespace {

using Outcome = std::tuple<int, int64_t, bool>;  // errno, bytes read, whether all are finite

std::vector<Outcome> read_files(const std::vector<std::string>& paths, const std::vector<int64_t>& offsets,
                                const std::vector<int64_t>& sizes, const std::vector<Address>& destinations,
                                bool check_finite, int num_threads) {
  std::vector<hmi::FileRead> reads;
  for (size_t i = 0; i < paths.size(); ++i) {
    reads.push_back({paths[i], offsets.at(i), sizes.at(i), pointer<char>(destinations.at(i))});
  }
  std::vector<Outcome> outcomes;
  for (const hmi::FileReadOutcome& each : hmi::read_files(reads, check_finite, num_threads)) {
    outcomes.emplace_back(each.error, each.bytes_read, each.is_finite);
  }
  return outcomes;
}

}  // namespace

void define_files(py::module_& m) {
  m.def("read_files", &read_files, py::arg("paths"), py::arg("offsets"), py::arg("sizes"), py::arg("destinations"),
        py::arg("check_finite"), py::arg("num_threads"), WithoutLock());
}

}  // namespace hmi::bindings
