// The only file that knows Python. Columns leave as bytes: whoever records them needs no NumPy.

#include <algorithm>
#include <cmath>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/prctl.h>

#include "clock.h"
#include "sampler.h"

namespace py = pybind11;
using pepr::Channel;
using pepr::Note;
using pepr::Sampler;

namespace {

constexpr std::size_t kBatchRows = 4096;

std::int64_t to_ns(double seconds) {
    return static_cast<std::int64_t>(std::llround(seconds * static_cast<double>(pepr::kNsPerS)));
}

template <typename T>
py::bytes to_bytes(const T* data, std::size_t count) {
    return {reinterpret_cast<const char*>(data), count * sizeof(T)};
}

py::object read_batch(Sampler& sampler) {
    const std::size_t width = sampler.width();
    std::vector<std::int64_t> t_ns(kBatchRows), read_ns(kBatchRows);
    std::vector<double> values(kBatchRows * width);
    const std::size_t n = sampler.read({t_ns.data(), read_ns.data(), values.data(), kBatchRows});
    if (n == 0) return py::none();
    // 4.3 s is long for a read; what outlasts it is a gap that t_ns shows too.
    std::vector<std::uint32_t> short_read_ns(n);
    std::transform(read_ns.begin(), read_ns.begin() + static_cast<std::ptrdiff_t>(n),
                   short_read_ns.begin(), [](std::int64_t ns) {
                       return static_cast<std::uint32_t>(std::min<std::int64_t>(ns, UINT32_MAX));
                   });
    py::list columns;
    for (std::size_t c = 0; c < width; ++c) columns.append(to_bytes(&values[c * kBatchRows], n));
    return py::make_tuple(n, to_bytes(t_ns.data(), n), to_bytes(short_read_ns.data(), n), columns);
}

py::dict stats_of(const Sampler& sampler) {
    const Sampler::Stats s = sampler.stats();
    py::dict result;
    result["samples"] = s.samples;
    result["late"] = s.late;
    result["skipped"] = s.skipped;
    result["failed_reads"] = s.failed_reads;
    result["lost"] = s.lost;
    result["cpu_s"] = 1e-9 * static_cast<double>(s.cpu_ns);
    return result;
}

std::string state_name(const Sampler& sampler) {
    switch (sampler.state()) {
        case Sampler::State::kOpening: return "opening";
        case Sampler::State::kRunning: return "running";
        case Sampler::State::kStopped: return "stopped";
        case Sampler::State::kFailed: return "failed";
    }
    return "failed";
}

bool set_child_subreaper() { return ::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0; }

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native recorder: drivers, sampling threads and their rings.";

    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const pepr::SensorError& error) {
            const auto type = py::module_::import("pepr_profiler.errors").attr("SensorError");
            const py::object value =
                type(error.what(), py::arg("why") = error.why, py::arg("fix") = error.hint);
            PyErr_SetObject(type.ptr(), value.ptr());
        }
    });

    py::class_<Channel>(m, "Channel", "What one recorded number is.")
        .def_readonly("name", &Channel::name)
        .def_readonly("quantity", &Channel::quantity)
        .def_readonly("unit", &Channel::unit)
        .def_readonly("scale", &Channel::scale)
        .def_readonly("modulus", &Channel::modulus)
        .def_readonly("counter", &Channel::counter)
        .def_readonly("source", &Channel::source)
        .def_readonly("labels", &Channel::labels);

    py::class_<Note>(m, "Note", "A part of a source that could not be opened.")
        .def_readonly("what", &Note::what)
        .def_readonly("why", &Note::why)
        .def_readonly("fix", &Note::fix);

    py::class_<Sampler>(m, "Sampler",
                        "One lane: one driver, read by its own thread into its own ring.")
        .def(py::init([](std::string spec, std::int64_t period_ns) {
                 if (period_ns <= 0) throw py::value_error("period_ns must be positive");
                 return std::make_unique<Sampler>(std::move(spec), period_ns);
             }),
             py::arg("spec"), py::arg("period_ns"))
        .def(
            "wait_ready",
            [](const Sampler& s, double timeout_s) { return s.wait_ready(to_ns(timeout_s)); },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
        .def(
            "stop", [](Sampler& s, double timeout_s) { return s.stop(to_ns(timeout_s)); },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
        .def("read", &read_batch)
        .def("stats", &stats_of)
        .def_property_readonly("state", &state_name)
        .def_property_readonly("channels", &Sampler::channels)
        .def_property_readonly("notes", &Sampler::notes);

    m.def("now_ns", &pepr::now_ns, "CLOCK_MONOTONIC in ns, as time.monotonic_ns().");
    m.def("set_child_subreaper", &set_child_subreaper,
          "Makes orphaned descendants of this process its children (prctl 36).");
}
