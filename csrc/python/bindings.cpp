// The Python module `_core`: sensors, sampling and what Linux offers. Columns of numbers leave it
// as bytes, so that a recording needs no NumPy. bindings_recording.cpp has the part that writes
// files.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/prctl.h>

#include "python/held_handlers.h"
#include "python/text.h"
#include "sampling/ring.h"
#include "sampling/sampler.h"
#include "system/clock.h"
#include "system/notifier.h"
#include "system/privileges.h"
#include "system/signals.h"

namespace py = pybind11;

void bind_recording(py::module_& m);  // bindings_recording.cpp

using pepr::Channel;
using pepr::CpuBudget;
using pepr::Note;
using pepr::Notifier;
using pepr::readable;
using pepr::RingView;
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

// Reads another process's ring, from the last row that began before `since_ns`.
class RingReader {
public:
    RingReader(int fd, std::int64_t since_ns) : ring_(fd), cursor_(ring_.find(since_ns)) {}
    std::size_t width() const noexcept { return ring_.width(); }
    std::uint64_t unread_rows() const noexcept { return ring_.head() - cursor_; }
    std::size_t read(const RingView::Columns& out) noexcept {
        return ring_.read(cursor_, out, lost);
    }
    std::size_t latest(const RingView::Columns& out) const noexcept { return ring_.latest(out); }
    std::uint64_t lost = 0;

private:
    RingView ring_;
    std::uint64_t cursor_;
};

template <typename Source>
py::object latest_row(const Source& source) {
    std::int64_t t_ns = 0, read_ns = 0;
    std::vector<double> values(source.width());
    if (source.latest({&t_ns, &read_ns, values.data(), 1}) == 0) return py::none();
    return py::make_tuple(t_ns, values);
}

// The next rows of a Sampler or a RingReader as (rows, t_ns, read_ns, columns); None: no new ones.
template <typename Source>
py::object read_batch(Source& source) {
    // No more memory than needed: with many channels a full batch is megabytes.
    const std::size_t rows = std::min<std::uint64_t>(source.unread_rows(), kBatchRows);
    if (rows == 0) return py::none();
    const std::size_t width = source.width();
    std::vector<std::int64_t> t_ns(rows), read_ns(rows);
    std::vector<double> values(rows * width);
    const std::size_t n = source.read({t_ns.data(), read_ns.data(), values.data(), rows});
    if (n == 0) return py::none();
    std::vector<std::uint32_t> short_read_ns(n);
    std::transform(read_ns.begin(), read_ns.begin() + static_cast<std::ptrdiff_t>(n),
                   short_read_ns.begin(), pepr::to_short_ns);
    py::list columns;
    for (std::size_t c = 0; c < width; ++c) columns.append(to_bytes(&values[c * rows], n));
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
    result["settled"] = s.settled;
    result["wasted"] = s.wasted;
    result["refresh_s"] = 1e-9 * static_cast<double>(s.refresh_ns);
    result["gap_s"] = 1e-9 * static_cast<double>(s.min_spacing_ns);
    return result;
}

const char* state_name(const Sampler& sampler) {
    constexpr const char* kNames[] = {"opening", "running", "stopped", "failed"};
    return kNames[static_cast<std::size_t>(sampler.state())];
}

// See signals.h. It replaces signal.sigtimedwait(), which returns uninitialised memory if the
// process is stopped (SIGSTOP, Slurm's suspend) and continues after the deadline (CPython 3.11
// to 3.14).
py::object wait_signal(const std::vector<int>& signals, std::int64_t deadline_ns,
                       const std::shared_ptr<Notifier>& notifier) {
    sigset_t set;
    sigemptyset(&set);
    for (const int signo : signals) sigaddset(&set, signo);
    for (;;) {
        std::optional<siginfo_t> info;
        int error = 0;
        {
            const py::gil_scoped_release release;
            info = pepr::wait_signal(set, deadline_ns, notifier ? notifier->fd() : -1, error);
        }
        if (info) return py::make_tuple(info->si_signo, info->si_code, info->si_pid);
        if (error == 0) return py::none();
        if (error != EINTR) throw std::system_error(error, std::generic_category(), "wait_signal");
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

template <typename Owner>
auto text_of(std::string Owner::* member) {
    return [member](const Owner& owner) { return readable(owner.*member); };
}

// What the handler of a signal raises, Python raises where a function begins, before its first
// line: one that must run cannot see to it itself.
py::object insistent(py::object method) {
    const py::cpp_function call([method = std::move(method)](const py::args& arguments) {
        try {
            return method(*arguments);
        } catch (const py::error_already_set&) {
            method(*arguments);
            throw;
        }
    });
    return py::reinterpret_steal<py::object>(PyInstanceMethod_New(call.ptr()));
}

bool set_child_subreaper() { return ::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0; }

}  // namespace

PYBIND11_MODULE(_core_of_main, m) {
    // Half of a module could not be imported again: its types are registered already.
    const pepr::HeldHandlers held;
    m.doc() = "The native recorder: sensors, the threads that read them, and their rows on disk.";

    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const pepr::SensorError& error) {
            const auto type = py::module_::import("pepr_profiler.errors").attr("SensorError");
            const py::object value = type(
                readable(error.note.what), py::arg("why") = readable(error.note.why),
                py::arg("fix") = readable(error.note.fix), py::arg("denied") = error.note.denied);
            PyErr_SetObject(type.ptr(), value.ptr());
        }
    });

    py::class_<Channel>(m, "SensorChannel", "What one recorded number is.")
        .def_property_readonly("name", text_of(&Channel::name))
        .def_property_readonly("quantity", text_of(&Channel::quantity))
        .def_property_readonly("unit", text_of(&Channel::unit))
        .def_readonly("scale", &Channel::scale)
        .def_readonly("modulus", &Channel::modulus)
        .def_readonly("counter", &Channel::counter)
        .def_property_readonly("source", text_of(&Channel::source))
        .def_property_readonly("labels", [](const Channel& channel) {
            py::dict labels;
            for (const auto& [key, value] : channel.labels) labels[readable(key)] = readable(value);
            return labels;
        });

    py::class_<Note>(m, "Note", "A part of a sensor that could not be opened.")
        .def_property_readonly("what", text_of(&Note::what))
        .def_property_readonly("why", text_of(&Note::why))
        .def_property_readonly("fix", text_of(&Note::fix))
        .def_readonly("denied", &Note::denied);

    py::class_<CpuBudget, std::shared_ptr<CpuBudget>>(
        m, "CpuBudget", "CPU time that lanes may take together, as a share of one core.")
        .def(py::init([](double share) {
                 if (!(share > 0)) throw py::value_error("share must be positive");
                 return std::make_shared<CpuBudget>(share);
             }),
             py::arg("share"));

    py::class_<Notifier, std::shared_ptr<Notifier>>(m, "Notifier",
                                                    "Wakes the thread that waits for it.")
        .def(py::init<>())
        .def("notify", &Notifier::notify)
        .def("clear", &Notifier::clear)
        .def(
            "wait",
            [](const Notifier& notifier, double timeout_s) {
                return notifier.wait(to_ns(timeout_s));
            },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>());

    py::class_<pepr::Readers, std::shared_ptr<pepr::Readers>>(
        m, "Readers", "The threads that read the lanes of a recording.")
        .def(py::init<>());

    py::class_<Sampler>(m, "Sampler", "One lane: one sensor, read into its own ring.")
        .def(py::init([](const py::str& spec, std::int64_t period_ns, bool learn,
                         std::shared_ptr<CpuBudget> budget,
                         std::optional<std::pair<std::int64_t, double>> coarse,
                         bool drop_capabilities, std::shared_ptr<pepr::Readers> readers,
                         std::shared_ptr<Notifier> notifier) {
                 if (period_ns <= 0) throw py::value_error("period_ns must be positive");
                 std::optional<pepr::Coarse> how;
                 if (coarse) how = pepr::Coarse{coarse->first, coarse->second};
                 if (coarse && !(how->period_ns > 0 && how->quantum_j > 0))
                     throw py::value_error("coarse is (period_ns, quantum_j), both positive");
                 return std::make_unique<Sampler>(
                     pepr::Lane::Options{pepr::system_bytes(spec), period_ns, learn,
                                         std::move(budget), how, drop_capabilities,
                                         std::move(notifier)},
                     std::move(readers));
             }),
             py::arg("spec"), py::arg("period_ns"), py::arg("learn") = false,
             py::arg("budget") = nullptr, py::arg("coarse") = py::none(),
             py::arg("drop_capabilities") = false, py::arg("readers") = nullptr,
             py::arg("notifier") = nullptr)
        .def(
            "wait_ready",
            [](const Sampler& s, double timeout_s) { return s.wait_ready(to_ns(timeout_s)); },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
        .def(
            "stop", [](Sampler& s, double timeout_s) { return s.stop(to_ns(timeout_s)); },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
        .def("share", &Sampler::share, py::arg("coarse") = false)
        .def("read", &read_batch<Sampler>)
        .def("latest", &latest_row<Sampler>)
        .def("stats", &stats_of)
        .def_property_readonly("state", &state_name)
        .def_property_readonly("channels", &Sampler::channels)
        .def_property_readonly("notes", &Sampler::notes);

    bind_recording(m);

    py::class_<RingReader>(m, "RingReader", "The ring of another process, read-only.")
        .def(py::init<int, std::int64_t>(), py::arg("fd"), py::arg("since_ns"))
        .def("read", &read_batch<RingReader>)
        .def("latest", &latest_row<RingReader>)
        .def_property_readonly("width", &RingReader::width)
        .def_readonly("lost", &RingReader::lost);

    m.def("keep_capabilities", &pepr::keep_capabilities, py::arg("mask"),
          "Drops the capabilities of this thread that are not in the mask.");
    m.def("keep_across_setuid", &pepr::keep_across_setuid, py::arg("keep"),
          "Sets whether a change of the user keeps the permitted capabilities (prctl 8).");
    m.def("forbid_privileges", &pepr::forbid_privileges,
          "Nothing executed from here on gains a privilege (prctl 24, 38).");
    m.def("now_ns", &pepr::now_ns, "CLOCK_MONOTONIC in ns, as time.monotonic_ns().");
    m.def(
        "wait_signal", &wait_signal, py::arg("signals"), py::arg("deadline_ns"),
        py::arg("notifier") = nullptr,
        "Waits for one of these blocked signals: (signo, code, pid). None at the deadline, or when "
        "the notifier is notified.");
    m.def("set_python_handler", &pepr::set_python_handler, py::arg("number"), py::arg("handler"),
          "Sets what Python does for a signal, and leaves the process's own disposition as it is.");
    m.def("insistent", &insistent, py::arg("method"),
          "The method, called once more when it raises; what it raised first is raised then.");
    m.def("set_child_subreaper", &set_child_subreaper,
          "Makes orphaned descendants of this process its children (prctl 36).");
}

// What Python calls to import the module. pybind11 would wait for ever in another interpreter than
// the main one, before any code of the module itself.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
    if (PyInterpreterState_Get() == PyInterpreterState_Main()) return PyInit__core_of_main();
    PyErr_SetString(PyExc_ImportError,
                    "pepr_profiler measures a process from its main interpreter only; in a "
                    "sub-interpreter, wrap the program: pepr-profile -- CMD");
    return nullptr;
}
