// Reading files: paths and numbers in, an outcome for each file out.
#include <algorithm>
#include <limits>

#include "bindings/bindings.h"
#include "common/file_reads.h"
#include "common/read_files.h"
#include "common/read_latency.h"
#include "common/reader_pool.h"

namespace hmi::bindings {
namespace {

using Outcome = std::tuple<int, int64_t, bool>;                // errno, bytes read, whether all are finite
using Progress = std::tuple<int, int, int64_t, bool, double>;  // ReadStage, the outcome, seconds that it took

std::vector<hmi::FileRead> file_reads(const std::vector<std::string>& paths, const std::vector<int64_t>& offsets,
                                      const std::vector<int64_t>& sizes, const std::vector<Address>& destinations) {
  std::vector<hmi::FileRead> reads;
  for (size_t i = 0; i < paths.size(); ++i) {
    reads.push_back({paths[i], offsets.at(i), sizes.at(i), pointer<char>(destinations.at(i))});
  }
  return reads;
}

std::vector<Outcome> read_files(const std::vector<std::string>& paths, const std::vector<int64_t>& offsets,
                                const std::vector<int64_t>& sizes, const std::vector<Address>& destinations,
                                bool check_finite, int num_threads) {
  std::vector<Outcome> outcomes;
  for (const hmi::FileReadOutcome& each :
       hmi::read_files(file_reads(paths, offsets, sizes, destinations), check_finite, num_threads)) {
    outcomes.emplace_back(each.error, each.bytes_read, each.is_finite);
  }
  return outcomes;
}

// Reads and the Python object that owns their destinations: it must outlive them, whoever forgets them meanwhile. The
// threads that read know nothing of Python, and hence cannot drop it when they are done. It is dropped by the next call
// that holds the interpreter's lock anyway and comes by: to start reads, to wait for some, to drop some, to ask a
// PinnedPool for memory.
struct StartedReads {
  std::shared_ptr<hmi::FileReads> reads;
  py::object owner;
};

// Guarded by the interpreter's lock. Never destroyed: at the end of the process a read that is stuck may come to life.
std::vector<StartedReads>& started_reads() {
  static auto* const all = new std::vector<StartedReads>;
  return *all;
}

void release_ended_reads() noexcept {
  std::vector<StartedReads>& all = started_reads();
  // One at a time: to drop a tensor may run anybody's code, this function too.
  for (;;) {
    const auto found = std::find_if(all.begin(), all.end(), [](const auto& each) { return each.reads->is_done(); });
    if (found == all.end()) return;
    const StartedReads ended = std::move(*found);
    all.erase(found);
  }
}

// What Python holds. Without it nobody can learn what was read. It is made before the reads start: a signal that comes
// while they do is handled as soon as this module returns, by an exception perhaps, and what it returned is lost then.
class ReadsHandle {
 public:
  ReadsHandle(const std::vector<std::string>& paths, const std::vector<int64_t>& offsets,
              const std::vector<int64_t>& sizes, const std::vector<Address>& destinations, bool check_finite,
              int num_threads, py::object owner)
      : reads_(std::make_shared<hmi::FileReads>(file_reads(paths, offsets, sizes, destinations), check_finite,
                                                num_threads)),
        owner_(std::move(owner)) {}
  ~ReadsHandle() {
    reads_->cancel();
    release_ended_reads();
  }
  ReadsHandle(const ReadsHandle&) = delete;
  ReadsHandle& operator=(const ReadsHandle&) = delete;

  hmi::FileReads& reads() const { return *reads_; }

  void start() {
    if (!owner_) throw std::runtime_error("these reads have been started before");
    release_ended_reads();
    started_reads().push_back({reads_, std::move(owner_)});
    const py::gil_scoped_release release;
    if (!hmi::reader_pool().submit(reads_)) {
      reads_->cancel();
      throw std::runtime_error("no file can be read: the system grants no thread; raise its limit or end other threads");
    }
  }

 private:
  const std::shared_ptr<hmi::FileReads> reads_;
  py::object owner_;  // empty once the reads have started
};

bool wait(const ReadsHandle& handle, double seconds) {
  bool is_done;
  {
    const py::gil_scoped_release release;
    is_done = handle.reads().wait(seconds);
  }
  if (is_done) release_ended_reads();
  return is_done;
}

std::vector<Progress> progress(const ReadsHandle& handle) {
  std::vector<Progress> all;
  for (const hmi::ReadProgress& each : handle.reads().progress()) {
    const auto& [error, bytes_read, is_finite] = each.outcome;
    all.emplace_back(static_cast<int>(each.stage), error, bytes_read, is_finite, each.seconds);
  }
  return all;
}

}  // namespace

void define_files(py::module_& m) {
  m.def("read_files", &read_files, py::arg("paths"), py::arg("offsets"), py::arg("sizes"), py::arg("destinations"),
        py::arg("check_finite"), py::arg("num_threads"), WithoutLock());
  py::class_<ReadsHandle>(m, "FileReads")
      .def(py::init<const std::vector<std::string>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                    const std::vector<Address>&, bool, int, py::object>(),
           py::arg("paths"), py::arg("offsets"), py::arg("sizes"), py::arg("destinations"), py::arg("check_finite"),
           py::arg("num_threads"), py::arg("owner"))
      .def("start", &ReadsHandle::start)
      .def("wait", &wait, py::arg("seconds"))
      .def("cancel", [](const ReadsHandle& handle) { handle.reads().cancel(); })
      .def("progress", &progress)
      .def_property_readonly("seconds", [](const ReadsHandle& handle) { return handle.reads().seconds(); });
  m.def("release_ended_reads", &release_ended_reads);
  m.def("set_read_latency", &hmi::set_read_latency, py::arg("seconds_per_read"), py::arg("bytes_per_second"));
}

}  // namespace hmi::bindings
