// The only file that knows Python. Columns leave as bytes: whoever records them needs no NumPy.

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

#include "clock.h"
#include "privileges.h"
#include "ring.h"
#include "sampler.h"
#include "thin.h"

namespace py = pybind11;
using pepr::Budget;
using pepr::Channel;
using pepr::Note;
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

// Another process's ring, from the last row that began before `since_ns`.
class RingReader {
public:
    RingReader(int fd, std::int64_t since_ns) : ring_(fd), cursor_(ring_.find(since_ns)) {}
    std::size_t width() const noexcept { return ring_.width(); }
    std::uint64_t waiting() const noexcept { return ring_.head() - cursor_; }
    std::size_t read(const RingView::Columns& out) noexcept {
        return ring_.read(cursor_, out, lost);
    }
    // The newest row, seen by nobody's cursor.
    std::size_t latest(const RingView::Columns& out) const noexcept {
        std::uint64_t cursor = ring_.head(), passed = 0;
        if (cursor == 0) return 0;
        --cursor;
        return ring_.read(cursor, out, passed);
    }
    std::uint64_t lost = 0;

private:
    RingView ring_;
    std::uint64_t cursor_;
};

py::object latest_row(const RingReader& reader) {
    std::int64_t t_ns = 0, read_ns = 0;
    std::vector<double> values(reader.width());
    if (reader.latest({&t_ns, &read_ns, values.data(), 1}) == 0) return py::none();
    return py::make_tuple(t_ns, values);
}

// Of a Sampler or a RingReader: both have rows of `width` numbers and a cursor.
template <typename Source>
py::object read_batch(Source& sampler) {
    // Memory for what is there: of a lane with many channels a full batch is megabytes to clear.
    const std::size_t rows = std::min<std::uint64_t>(sampler.waiting(), kBatchRows);
    if (rows == 0) return py::none();
    const std::size_t width = sampler.width();
    std::vector<std::int64_t> t_ns(rows), read_ns(rows);
    std::vector<double> values(rows * width);
    const std::size_t n = sampler.read({t_ns.data(), read_ns.data(), values.data(), rows});
    if (n == 0) return py::none();
    // 4.3 s is long for a read; what outlasts it is a gap that t_ns shows too.
    std::vector<std::uint32_t> short_read_ns(n);
    std::transform(read_ns.begin(), read_ns.begin() + static_cast<std::ptrdiff_t>(n),
                   short_read_ns.begin(), [](std::int64_t ns) {
                       return static_cast<std::uint32_t>(std::min<std::int64_t>(ns, UINT32_MAX));
                   });
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
    result["gap_s"] = 1e-9 * static_cast<double>(s.gap_ns);
    return result;
}

const char* state_name(const Sampler& sampler) {
    constexpr const char* kNames[] = {"opening", "running", "stopped", "failed"};
    return kNames[static_cast<std::size_t>(sampler.state())];
}

pepr::ThinRule rule_of(const std::pair<std::string, double>& rule) {
    using Kind = pepr::ThinRule::Kind;
    if (rule.first == "line") return {Kind::kLine, rule.second};
    if (rule.first == "hold") return {Kind::kHold, rule.second};
    if (rule.first == "level") return {Kind::kLevel, rule.second};
    throw py::value_error("a rule is line, hold or level");
}

template <typename T>
py::bytes pick(std::string_view column, const std::vector<std::size_t>& rows) {
    std::vector<T> kept(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i)
        std::memcpy(&kept[i], column.data() + rows[i] * sizeof(T), sizeof(T));
    return to_bytes(kept.data(), kept.size());
}

// Columns as LaneWriter keeps them: t_ns, read_ns, skipped, gap_ns, and a float64 a channel.
py::list thin_columns(const std::vector<std::string_view>& columns,
                      const std::vector<std::pair<std::string, double>>& rules, std::size_t whole) {
    constexpr std::size_t kTimes = 4;
    if (columns.size() != rules.size() + kTimes) throw py::value_error("a rule a channel");
    const std::size_t n = columns[0].size() / sizeof(std::int64_t);
    for (std::size_t c = 0; c < columns.size(); ++c)
        if (columns[c].size() != n * (c == 0 || c >= kTimes ? 8 : 4))
            throw py::value_error("columns differ in length");
    std::vector<std::int64_t> t_ns(n);
    std::vector<double> values(n * rules.size());
    if (n > 0) std::memcpy(t_ns.data(), columns[0].data(), n * sizeof(std::int64_t));
    for (std::size_t c = 0; n > 0 && c < rules.size(); ++c)
        std::memcpy(&values[c * n], columns[kTimes + c].data(), n * sizeof(double));
    std::vector<pepr::ThinRule> native;
    for (const auto& rule : rules) native.push_back(rule_of(rule));
    const auto rows = pepr::thin(native, t_ns.data(), values.data(), n, n, whole);
    std::vector<std::uint32_t> skipped(rows.size());
    for (std::size_t i = 1; i < rows.size(); ++i)
        skipped[i] = static_cast<std::uint32_t>(rows[i] - rows[i - 1] - 1);
    py::list result;
    result.append(pick<std::int64_t>(columns[0], rows));
    result.append(pick<std::uint32_t>(columns[1], rows));
    result.append(to_bytes(skipped.data(), skipped.size()));
    result.append(pick<std::uint32_t>(columns[3], rows));
    for (std::size_t c = 0; c < rules.size(); ++c)
        result.append(pick<double>(columns[kTimes + c], rows));
    return result;
}

// How long before each row the one before it was read, uint32, at most 4.29 s. `before_ns` is the
// row before the first; none: the first has no row before it.
py::bytes gaps(std::string_view t_ns, std::optional<std::int64_t> before_ns) {
    const std::size_t n = t_ns.size() / sizeof(std::int64_t);
    std::vector<std::uint32_t> result(n);
    for (std::size_t i = 0; i < n; ++i) {
        std::int64_t at_ns;
        std::memcpy(&at_ns, t_ns.data() + i * sizeof at_ns, sizeof at_ns);
        const std::int64_t gap_ns = at_ns - before_ns.value_or(at_ns);
        result[i] = static_cast<std::uint32_t>(std::clamp<std::int64_t>(gap_ns, 0, UINT32_MAX));
        before_ns = at_ns;
    }
    return to_bytes(result.data(), n);
}

// A pending signal of the set as (signo, code, pid), or None when CLOCK_MONOTONIC is at the
// deadline. As signal.sigtimedwait(), which returns memory that nobody has written when it is
// stopped (SIGSTOP, Slurm's suspend) and goes on behind its deadline (CPython 3.11 to 3.14).
py::object wait_signal(const std::vector<int>& signals, std::int64_t deadline_ns) {
    sigset_t set;
    sigemptyset(&set);
    for (const int signo : signals) sigaddset(&set, signo);
    for (;;) {
        const timespec left =
            pepr::to_timespec(std::max<std::int64_t>(0, deadline_ns - pepr::now_ns()));
        siginfo_t info{};
        int error = 0;
        {
            const py::gil_scoped_release release;
            if (::sigtimedwait(&set, &info, &left) < 0) error = errno;
        }
        if (error == 0) return py::make_tuple(info.si_signo, info.si_code, info.si_pid);
        if (error == EAGAIN) return py::none();
        if (error != EINTR) throw std::system_error(error, std::generic_category(), "sigtimedwait");
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
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

    py::class_<Budget, std::shared_ptr<Budget>>(
        m, "Budget", "CPU time that lanes may take together, as a share of one core.")
        .def(py::init([](double share) {
                 if (!(share > 0)) throw py::value_error("share must be positive");
                 return std::make_shared<Budget>(share);
             }),
             py::arg("share"));

    py::class_<pepr::Crew, std::shared_ptr<pepr::Crew>>(m, "Crew", "The threads of a recording.")
        .def(py::init<>());

    py::class_<Sampler>(m, "Sampler", "One lane: one driver, read into its own ring.")
        .def(py::init([](std::string spec, std::int64_t period_ns, bool learn,
                         std::shared_ptr<Budget> budget,
                         std::optional<std::pair<std::int64_t, double>> coarse, bool relinquish,
                         std::shared_ptr<pepr::Crew> crew) {
                 if (period_ns <= 0) throw py::value_error("period_ns must be positive");
                 std::optional<pepr::Coarse> how;
                 if (coarse) how = pepr::Coarse{coarse->first, coarse->second};
                 if (coarse && !(how->period_ns > 0 && how->quantum_j > 0))
                     throw py::value_error("coarse is (period_ns, quantum_j), both positive");
                 return std::make_unique<Sampler>(
                     pepr::Lane::How{std::move(spec), period_ns, learn, std::move(budget), how,
                                     relinquish},
                     std::move(crew));
             }),
             py::arg("spec"), py::arg("period_ns"), py::arg("learn") = false,
             py::arg("budget") = nullptr, py::arg("coarse") = py::none(),
             py::arg("relinquish") = false, py::arg("crew") = nullptr)
        .def(
            "wait_ready",
            [](const Sampler& s, double timeout_s) { return s.wait_ready(to_ns(timeout_s)); },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
        .def(
            "stop", [](Sampler& s, double timeout_s) { return s.stop(to_ns(timeout_s)); },
            py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
        .def("share", &Sampler::share, py::arg("coarse") = false)
        .def("read", &read_batch<Sampler>)
        .def("stats", &stats_of)
        .def_property_readonly("state", &state_name)
        .def_property_readonly("channels", &Sampler::channels)
        .def_property_readonly("notes", &Sampler::notes);

    py::class_<RingReader>(m, "RingReader", "The ring of another process, read-only.")
        .def(py::init<int, std::int64_t>(), py::arg("fd"), py::arg("since_ns"))
        .def("read", &read_batch<RingReader>)
        .def("latest", &latest_row)
        .def_property_readonly("width", &RingReader::width)
        .def_readonly("lost", &RingReader::lost);

    m.def("keep_capabilities", &pepr::keep_capabilities, py::arg("mask"),
          "Leaves this thread those of its capabilities that are in the mask.");
    m.def("keep_across_setuid", &pepr::keep_across_setuid, py::arg("keep"),
          "Whether a change of the user keeps the permitted capabilities (prctl 8).");
    m.def("forbid_privileges", &pepr::forbid_privileges,
          "Nothing that is executed from here on gains a privilege (prctl 24, 38).");
    m.def("now_ns", &pepr::now_ns, "CLOCK_MONOTONIC in ns, as time.monotonic_ns().");
    m.def("thin", &thin_columns, py::arg("columns"), py::arg("rules"), py::arg("whole") = 0,
          "The rows of a recording that must be kept, see thin.h.");
    m.def("gaps", &gaps, py::arg("t_ns"), py::arg("before_ns"),
          "The time between rows, ns, as uint32; before_ns is the row before the first.");
    m.def("wait_signal", &wait_signal, py::arg("signals"), py::arg("deadline_ns"),
          "The next of these blocked signals as (signo, code, pid), None at the deadline.");
    m.def("set_child_subreaper", &set_child_subreaper,
          "Makes orphaned descendants of this process its children (prctl 36).");
}
