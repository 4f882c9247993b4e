#include "nvml/scenario.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace pepr::sim {

namespace {

unsigned rounded(double value) { return static_cast<unsigned>(std::max(0.0, std::round(value))); }

void sleep_until_s(double t_s, const Scenario& scenario) {
    for (double left_s = t_s - scenario.now_s(); left_s > 0; left_s = t_s - scenario.now_s()) {
        const double nap_s = std::min(left_s, 1000.0);  // inf does not fit a timespec
        const double whole_s = std::floor(nap_s);
        const timespec nap{static_cast<time_t>(whole_s),
                           static_cast<long>((nap_s - whole_s) * 1e9)};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, nullptr);
    }
}

}  // namespace

unsigned Gpu::window_mw(const Wave& wave, double end_s, double window_s) const {
    const double at_s = end_s - sensor.delay_s;
    const double mean_w = sensor.smoothing_s > 0 ? wave.smoothed_w(at_s, sensor.smoothing_s)
                                                 : wave.mean_w(at_s - window_s, at_s);
    return rounded(1e3 * (sensor.gain * mean_w + sensor.offset_w));
}

unsigned Gpu::instant_mw(const Wave& wave, double t_s) const {
    return window_mw(wave, sensor.last_refresh_s(t_s, sensor.refresh_s), sensor.window_s);
}

unsigned Gpu::average_mw(const Wave& wave, double t_s) const {
    return window_mw(wave, sensor.last_refresh_s(t_s, sensor.refresh_s), sensor.average_s);
}

unsigned Gpu::sample_mw(double at_s) const { return window_mw(power, at_s, sensor.window_s); }

unsigned long long Gpu::counter_mj(double t_s) const {
    const double at_s = sensor.last_refresh_s(t_s, sensor.counter_refresh_s);
    const auto seen_mj = [&](double until_s) {
        const double behind_s = until_s - sensor.counter_delay_s;
        const Wave& wave = counted ? *counted : power;
        return 1e3 * (sensor.counter_gain * wave.integral_j(behind_s) +
                      sensor.counter_offset_w * behind_s);
    };
    double origin_mj = -counter_start_mj;
    for (const double reset_s : resets_s) {
        if (reset_s <= at_s) origin_mj = seen_mj(reset_s);
    }
    return static_cast<unsigned long long>(std::max(0.0, seen_mj(at_s) - origin_mj));
}

unsigned long long Gpu::used_bytes(double t_s) const {
    return static_cast<unsigned long long>(std::max(0.0, memory_used_bytes.value(t_s)));
}

std::vector<Process> Gpu::present() const {
    std::vector<Process> all;
    for (const auto& process : processes) {
        if (process.pid != 0) {
            all.push_back(process);
            continue;
        }
        std::error_code gone;
        for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", gone)) {
            std::ifstream children(task.path() / "children");
            for (unsigned pid; children >> pid;) {
                all.push_back(process);
                all.back().pid = pid;
            }
        }
    }
    std::ifstream file(processes_file);
    for (std::string text; std::getline(file, text);) {
        std::istringstream words(text);
        Process process;
        if (words >> process.pid >> process.used_bytes >> process.sm) all.push_back(process);
    }
    return all;
}

unsigned Gpu::percent(const Wave& fraction, double t_s) const {
    const double at_s = sensor.last_refresh_s(t_s, kUtilizationPeriod_s);
    return std::min(100U, rounded(100 * fraction.mean_w(at_s - kUtilizationPeriod_s, at_s)));
}

bool Fault::concerns(const char* name, int on_gpu, int on_field) const {
    return (gpu < 0 || gpu == on_gpu) && field == on_field &&
           std::strncmp(name, function.c_str(), function.size()) == 0;
}

bool Fault::hits(double t_s) const {
    return start_s <= t_s && t_s < end_s &&
           calls.fetch_add(1, std::memory_order_relaxed) % every == every - 1;
}

Verdict Scenario::consult(const char* function, int gpu, int field) const {
    Verdict verdict;
    for (const auto& fault : faults_) {
        if (!fault->concerns(function, gpu, field) || !fault->hits(now_s())) continue;
        switch (fault->effect) {
            case Effect::kHang: sleep_until_s(fault->end_s, *this); break;
            case Effect::kSlow: sleep_until_s(now_s() + fault->argument, *this); break;
            case Effect::kZero: verdict.zero = true; break;
            case Effect::kReturn:
                verdict.code = static_cast<nvmlReturn_t>(static_cast<int>(fault->argument));
        }
    }
    return verdict;
}

Scenario::Scenario(const std::string& path) : epoch_ns_(monotonic_ns()) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    std::string text;
    for (int number = 1; std::getline(file, text); ++number) {
        try {
            Line line(text);
            if (!line.done()) directive(line);
            if (!line.done()) throw std::runtime_error("too many words: " + line.rest());
        } catch (const std::runtime_error& error) {
            throw std::runtime_error(path + ":" + std::to_string(number) + ": " + error.what());
        }
    }
    timespec wall{};
    clock_gettime(CLOCK_REALTIME, &wall);
    unix_epoch_us_ = wall.tv_sec * 1'000'000LL + (wall.tv_nsec - monotonic_ns() + epoch_ns_) / 1000;
}

void Scenario::directive(Line& line) {
    const auto key = line.word();
    if (key == "epoch_ns") {
        if (const auto at = line.word(); at != "init") epoch_ns_ = parse<long long>(at);
    } else if (key == "driver_version") {
        driver_version = line.rest();
    } else if (key == "gpu") {
        gpus.push_back(std::make_unique<Gpu>());
        gpus.back()->index = static_cast<unsigned>(gpus.size() - 1);
        gpus.back()->uuid = line.word();
        gpus.back()->name = line.rest();
    } else if (key == "fault") {
        auto fault = std::make_unique<Fault>();
        fault->function = line.word();
        fault->start_s = line.number();
        fault->end_s = line.number();
        fault->gpu = line.choice();
        fault->field = line.choice();
        fault->every = line.number<unsigned>();
        const auto effect = line.word();
        if (effect == "zero")
            fault->effect = Effect::kZero;
        else if (effect == "hang")
            fault->effect = Effect::kHang;
        else if (effect == "slow")
            fault->effect = Effect::kSlow;
        else if (effect != "return")
            throw std::runtime_error("no such effect: " + effect);
        if (effect == "return" || effect == "slow") fault->argument = line.number();
        if (fault->every == 0) throw std::runtime_error("`every` counts from 1");
        faults_.push_back(std::move(fault));
    } else if (!gpus.empty()) {
        of_gpu(key, line, *gpus.back());
    } else {
        throw std::runtime_error("no such directive, or no gpu before it: " + key);
    }
}

void Scenario::of_gpu(const std::string& key, Line& line, Gpu& gpu) {
    if (key == "power")
        gpu.power = Wave(line);
    else if (key == "module")
        gpu.module = std::make_unique<Wave>(line);
    else if (key == "counted")
        gpu.counted = std::make_unique<Wave>(line);
    else if (key == "lag") {
        auto& sensor = gpu.sensor;
        for (double* value : {&sensor.delay_s, &sensor.smoothing_s, &sensor.counter_delay_s})
            *value = line.number();
    } else if (key == "utilization")
        gpu.utilization = Wave(line);
    else if (key == "memory_utilization")
        gpu.memory_utilization = Wave(line);
    else if (key == "memory_used")
        gpu.memory_used_bytes = Wave(line);
    else if (key == "sensor") {
        auto& sensor = gpu.sensor;
        for (double* value :
             {&sensor.refresh_s, &sensor.window_s, &sensor.phase_s, &sensor.average_s})
            *value = line.number();
        sensor.averages = line.word() == "average";
        sensor.counter_refresh_s = line.number();
        sensor.samples_refresh_s = line.number();
    } else if (key == "error") {
        auto& sensor = gpu.sensor;
        for (double* value :
             {&sensor.gain, &sensor.offset_w, &sensor.counter_gain, &sensor.counter_offset_w})
            *value = line.number();
    } else if (key == "counter") {
        gpu.counter_start_mj = line.number();
        while (!line.done()) gpu.resets_s.push_back(line.number());
    } else if (key == "memory") {
        gpu.memory_total_bytes = line.number<unsigned long long>();
        gpu.memory_reserved_bytes = line.number<unsigned long long>();
    } else if (key == "process") {
        Process process;
        process.pid = line.number<unsigned>();
        process.used_bytes = line.number<unsigned long long>();
        for (double* value : {&process.sm, &process.mem, &process.start_s, &process.end_s})
            *value = line.number();
        if (const auto more = line.done() ? "" : line.word(); more == "mps")
            process.mps = true;
        else if (!more.empty())
            process.instance = static_cast<unsigned>(std::stoul(more));
        gpu.processes.push_back(process);
    } else if (key == "processes_file") {
        gpu.processes_file = line.rest();
    } else if (key == "power_limit") {
        gpu.power_limit_w = line.number();
    } else if (key == "mig") {
        const auto mode = line.word();
        gpu.mig = mode == "on" ? NVML_DEVICE_MIG_ENABLE : mode == "off" ? 0 : -1;
    } else {
        throw std::runtime_error("no such directive: " + key);
    }
}

}  // namespace pepr::sim
