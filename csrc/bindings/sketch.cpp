// FrequencySketch. Its items travel as the bytes of (int64 key, float64 weight) pairs.
#include "cpu/frequency_sketch.h"

#include "bindings/bindings.h"

namespace hmi::bindings {
namespace {

void add(hmi::FrequencySketch& sketch, Address keys, int64_t count, double weight) {
  sketch.add(pointer<const int64_t>(keys), count, weight);
}

void add_windows(hmi::FrequencySketch& sketch, Address input_ids, int64_t num_tokens, Address sequence_offsets,
                 int64_t num_sequences, Address sequence_numbers, int64_t num_numbers, int window, double weight) {
  const hmi::PackedSequences sequences{pointer<const int32_t>(input_ids), pointer<const int64_t>(sequence_offsets),
                                       num_sequences, num_tokens};
  sketch.add_windows(sequences, pointer<const int64_t>(sequence_numbers), num_numbers, window, weight);
}

py::bytearray items(const hmi::FrequencySketch& sketch, double min_weight) {
  std::vector<hmi::KeyWeight> items;
  {
    py::gil_scoped_release release;
    items = sketch.items(min_weight);
  }
  return py::bytearray(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(hmi::KeyWeight));
}

}  // namespace

void define_sketch(py::module_& m) {
  using Sketch = hmi::FrequencySketch;
  m.def("sketch_max_memory_bytes", &Sketch::max_memory_bytes, py::arg("max_items"));
  py::class_<Sketch>(m, "FrequencySketch")
      .def(py::init<int64_t>(), py::arg("max_items"))
      .def("add", &add, py::arg("keys"), py::arg("count"), py::arg("weight"), WithoutLock())
      .def("add_windows", &add_windows, py::arg("input_ids"), py::arg("num_tokens"), py::arg("sequence_offsets"),
           py::arg("num_sequences"), py::arg("sequence_numbers"), py::arg("num_numbers"), py::arg("window"),
           py::arg("weight"), WithoutLock())
      .def("merge", &Sketch::merge, py::arg("other"), WithoutLock())
      .def("scale", &Sketch::scale, py::arg("factor"), WithoutLock())
      .def("clear", &Sketch::clear, WithoutLock())
      .def("items", &items, py::arg("min_weight"))
      .def("__len__", &Sketch::size, WithoutLock())
      .def_property_readonly("total", py::cpp_function(&Sketch::total, WithoutLock()))
      .def_property_readonly("max_error", py::cpp_function(&Sketch::max_error, WithoutLock()))
      .def_property_readonly("memory_bytes", py::cpp_function(&Sketch::memory_bytes, WithoutLock()));
}

}  // namespace hmi::bindings
