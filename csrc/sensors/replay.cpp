// Plays a recorded or scripted stream of readings in real time, from the moment it is opened.
//
// The file is text with fields separated by tabs; lines that begin with # are comments:
//   channel  NAME  QUANTITY  UNIT  SCALE  MODULUS  counter|gauge  SOURCE  [KEY=VALUE …]
//   SECONDS  VALUE  VALUE …          one value for each channel, "nan" where unknown
// Times increase. A poll returns the last row whose time has come.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "sensors/sensor.h"
#include "system/clock.h"
#include "system/file.h"
#include "system/numbers.h"

namespace pepr {

namespace {

std::vector<std::string> split(const std::string& line) {
    std::vector<std::string> fields;
    std::istringstream stream(line);
    for (std::string field; std::getline(stream, field, '\t');) fields.push_back(field);
    return fields;
}

double number(const std::string& text) {
    char* end = nullptr;
    const double value = to_double(text.c_str(), &end);
    if (text.empty() || *end != '\0') throw std::invalid_argument("'" + text + "' is not a number");
    return value;
}

class Replay final : public Sensor {
public:
    explicit Replay(const std::string& path) : path_(path) {
        std::ifstream file(path);
        if (!file) {
            const int error = errno;
            throw SensorError(
                Note{"replay file '" + path + "' cannot be read", std::strerror(error),
                     "use --sensor replay:FILE with an existing file", is_denied(error)});
        }
        std::string line;
        for (int number = 1; std::getline(file, line); ++number) {
            if (line.empty() || line[0] == '#') continue;
            const auto fields = split(line);
            try {
                fields[0] == "channel" ? add_channel(fields) : add_row(fields);
            } catch (const std::exception& error) {
                throw SensorError(
                    path + ":" + std::to_string(number) + " is not a replay line", error.what(),
                    "lines are 'channel<TAB>…' or 'SECONDS<TAB>VALUE…', see the docs");
            }
        }
        if (channels_.empty() || t_ns_.empty())
            throw SensorError("replay file '" + path + "' is empty", "it has no channel or no row",
                              "give it 'channel' lines and at least one row");
        opened_ns_ = now_ns();
    }

    void poll(double* out) noexcept override {
        const std::int64_t t_ns = now_ns() - opened_ns_;
        while (next_ < t_ns_.size() && t_ns_[next_] <= t_ns) ++next_;
        const std::size_t width = channels_.size();
        if (next_ == 0)
            std::fill_n(out, width, kUnknown);
        else
            std::copy_n(values_.begin() + static_cast<std::ptrdiff_t>((next_ - 1) * width), width,
                        out);
    }

private:
    void add_channel(const std::vector<std::string>& f) {
        if (f.size() < 8) throw std::invalid_argument("a channel line has at least 8 fields");
        if (!t_ns_.empty()) throw std::invalid_argument("channels come before rows");
        if (f[6] != "counter" && f[6] != "gauge")
            throw std::invalid_argument("'" + f[6] + "' is neither counter nor gauge");
        Channel channel{f[1], f[2], f[3], number(f[4]), number(f[5]), f[6] == "counter", f[7], {}};
        for (std::size_t i = 8; i < f.size(); ++i) {
            const auto equals = f[i].find('=');
            if (equals == std::string::npos) throw std::invalid_argument("a label is KEY=VALUE");
            channel.labels[f[i].substr(0, equals)] = f[i].substr(equals + 1);
        }
        channels_.push_back(std::move(channel));
    }

    void add_row(const std::vector<std::string>& f) {
        if (f.size() != channels_.size() + 1)
            throw std::invalid_argument("a row has a time and one value a channel");
        const double t_s = number(f[0]);
        if (!(std::abs(t_s) < 1e9)) throw std::invalid_argument("a time is a number of seconds");
        const auto t_ns = static_cast<std::int64_t>(t_s * static_cast<double>(kNsPerS));
        if (!t_ns_.empty() && t_ns <= t_ns_.back())
            throw std::invalid_argument("times must increase");
        for (std::size_t i = 1; i < f.size(); ++i) values_.push_back(number(f[i]));
        t_ns_.push_back(t_ns);
    }

    std::string path_;
    std::vector<std::int64_t> t_ns_;
    std::vector<double> values_;
    std::size_t next_ = 0;
    std::int64_t opened_ns_ = 0;
};

}  // namespace

std::unique_ptr<Sensor> open_replay(const std::string& where) {
    return std::make_unique<Replay>(where);
}

}  // namespace pepr
