// The part of the Python module `_core` that writes a recording's files and reads its threads'
// clocks.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/text.h"
#include "recording/journal.h"
#include "recording/lane_file.h"
#include "recording/thin.h"
#include "sampling/cadence.h"
#include "sampling/sampler.h"
#include "sensors/task_clock.h"
#include "system/notifier.h"

namespace py = pybind11;
using pepr::Journal;
using pepr::LaneFile;
using pepr::Notifier;
using pepr::Sampler;

namespace {

pepr::ThinRule rule_of(const std::pair<std::string, double>& rule) {
    using Kind = pepr::ThinRule::Kind;
    if (rule.first == "line") return {Kind::kLine, rule.second};
    if (rule.first == "hold") return {Kind::kHold, rule.second};
    if (rule.first == "level") return {Kind::kLevel, rule.second};
    throw py::value_error("a rule is line, hold or level");
}

std::shared_ptr<LaneFile> open_file(const py::str& stem, std::string_view schema,
                                    const std::vector<std::pair<std::string, double>>& rules) {
    LaneFile::Options options{pepr::system_bytes(stem), std::string(schema), {}};
    for (const auto& rule : rules) options.rules.push_back(rule_of(rule));
    try {
        return std::make_shared<LaneFile>(std::move(options));
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.what());
        throw py::error_already_set();
    }
}

// Appends rows as Sampler.read returns them.
void append_rows(LaneFile& file, std::string_view t_ns, std::string_view read_ns,
                 const std::vector<std::string_view>& values) {
    const std::size_t n = t_ns.size() / sizeof(std::int64_t);
    if (values.size() != file.width())
        throw py::value_error("there must be one column for each channel");
    std::vector<std::int64_t> begin_ns(n), took_ns(n);
    std::vector<std::uint32_t> short_ns(n);
    std::vector<double> columns(n * values.size());
    const auto copy = [](auto* to, std::size_t count, std::string_view from) {
        if (from.size() != count * sizeof *to) throw py::value_error("columns differ in length");
        if (count > 0) std::memcpy(to, from.data(), from.size());
    };
    copy(begin_ns.data(), n, t_ns);
    copy(short_ns.data(), n, read_ns);
    std::copy(short_ns.begin(), short_ns.end(), took_ns.begin());
    for (std::size_t c = 0; c < values.size(); ++c) copy(columns.data() + c * n, n, values[c]);
    const py::gil_scoped_release release;
    file.append({begin_ns.data(), took_ns.data(), columns.data(), n}, n);
}

}  // namespace

void bind_recording(py::module_& m) {
    m.attr("MAX_PLAUSIBLE_W") = pepr::kMaxPlausibleW;
    m.attr("REFRESH_CHANGES") = pepr::kRefreshChanges;
    m.attr("FEWEST_REFRESH_CHANGES") = pepr::kFewestRefreshChanges;

    py::class_<LaneFile, std::shared_ptr<LaneFile>>(m, "LaneFile", "One lane on disk.")
        .def(py::init(&open_file), py::arg("stem"), py::arg("schema"), py::arg("rules"))
        .def("append", &append_rows, py::arg("t_ns"), py::arg("read_ns"), py::arg("values"))
        .def("flush", &LaneFile::flush, py::arg("last") = false,
             py::call_guard<py::gil_scoped_release>())
        .def(
            "move_to",
            [](LaneFile& file, const py::str& stem) {
                const std::string to = pepr::system_bytes(stem);
                const py::gil_scoped_release release;
                return file.move_to(to);
            },
            py::arg("stem"))
        .def_property_readonly("error", &LaneFile::error)
        .def_property_readonly("dropped_rows", &LaneFile::dropped_rows)
        .def_property_readonly("lost_rows", &LaneFile::lost_rows);

    py::class_<pepr::ThreadClock>(
        m, "ThreadClock", "CPU time of the thread that makes it, and of what that starts, in s.")
        .def(py::init<>())
        .def("read_s", &pepr::ThreadClock::read_s)
        .def_property_readonly("counts_started", &pepr::ThreadClock::counts_started);

    py::class_<Journal>(m, "Journal", "Writes lanes to disk from a thread of its own.")
        .def(py::init([](double period_s, std::shared_ptr<Notifier> notifier) {
                 return std::make_unique<Journal>(std::llround(period_s * 1e9),
                                                  std::move(notifier));
             }),
             py::arg("period_s"), py::arg("notifier"))
        .def(
            "add",
            [](Journal& journal, const Sampler& sampler, std::shared_ptr<LaneFile> file) {
                if (file->width() != sampler.width())
                    throw py::value_error("the file is of another lane");
                const py::gil_scoped_release release;  // add() waits while the journal writes
                journal.add(sampler.lane(), std::move(file));
            },
            py::arg("sampler"), py::arg("file"))
        .def("flush", &Journal::flush, py::call_guard<py::gil_scoped_release>())
        .def("stop", &Journal::stop, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("cpu_s", [](const Journal& journal) {
            return 1e-9 * static_cast<double>(journal.cpu_ns());
        });
}
