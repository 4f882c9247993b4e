// Energy, power, utilisation and memory of every NVIDIA GPU, through the driver's library. A UUID
// identifies a device, because indices change across boots.

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>

#include "sensors/nvml_library.h"
#include "system/clock.h"
#include "system/numbers.h"

namespace pepr {

namespace {

double field_value(const nvmlFieldValue_t& field) noexcept {
    if (field.nvmlReturn != NVML_SUCCESS) return kUnknown;
    switch (field.valueType) {
        case NVML_VALUE_TYPE_DOUBLE: return field.value.dVal;
        case NVML_VALUE_TYPE_UNSIGNED_INT: return field.value.uiVal;
        case NVML_VALUE_TYPE_UNSIGNED_LONG: return static_cast<double>(field.value.ulVal);
        case NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: return static_cast<double>(field.value.ullVal);
        case NVML_VALUE_TYPE_SIGNED_LONG_LONG: return static_cast<double>(field.value.sllVal);
        case NVML_VALUE_TYPE_SIGNED_INT: return field.value.siVal;
        default: return kUnknown;
    }
}

enum class Call { kEnergy, kPower, kUtilisation, kMemory, kField };

struct Reading {
    Call call;
    unsigned field, scope;
    const char *name, *quantity, *unit;
    double scale;
    bool counter;
    const char* source;
};

// clang-format off
constexpr std::array<Reading, 9> kReadings{{
    {Call::kEnergy, 0, 0, "energy", "energy", "J", 1e-3, true, "nvml-energy"},
    {Call::kPower, 0, 0, "power", "power", "W", 1e-3, false, "nvml-power"},
    {Call::kUtilisation, 0, 0, "utilisation", "utilisation", "1", 0.01, false, "nvml-utilisation"},
    {Call::kMemory, 0, 0, "memory_used", "memory", "B", 1.0, false, "nvml-memory"},
    {Call::kField, NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, 0,
     "energy", "energy", "J", 1e-3, true, "nvml-energy"},
    {Call::kField, NVML_FI_DEV_POWER_INSTANT, NVML_POWER_SCOPE_GPU,
     "power_instant", "power", "W", 1e-3, false, "nvml-power-instant"},
    {Call::kField, NVML_FI_DEV_POWER_AVERAGE, NVML_POWER_SCOPE_GPU,
     "power_average", "power", "W", 1e-3, false, "nvml-power-average"},
    // The module of a Grace Hopper is the GPU with its CPU and memory.
    {Call::kField, NVML_FI_DEV_POWER_INSTANT, NVML_POWER_SCOPE_MODULE,
     "module_power_instant", "power", "W", 1e-3, false, "nvml-module-instant"},
    {Call::kField, NVML_FI_DEV_POWER_AVERAGE, NVML_POWER_SCOPE_MODULE,
     "module_power_average", "power", "W", 1e-3, false, "nvml-module-average"},
}};
// clang-format on
enum : std::size_t {
    kEnergyCall,
    kPowerCall,
    kUtilisation,
    kMemory,
    kEnergyField,
    kInstant,
    kAverage,
    kModule,
    kModuleAverage
};

// A call takes a driver from 2.5 us to milliseconds, under a lock that the program may wait for
// (docs/measurement, B). So what says nothing about energy (utilisation, memory, the power of a
// board with a counter) is read no more often than this, and keeps its value in between.
constexpr std::int64_t kGaugesNs = 200'000'000;
// A counter that has not changed for longer is dead (pynvml 54, DCGM 171).
constexpr std::int64_t kSilentNs = 1'000'000'000;

nvmlFieldValue_t request(const Reading& reading) noexcept {
    nvmlFieldValue_t field{};
    field.fieldId = reading.field;
    field.scopeId = reading.scope;
    return field;
}

class Nvml final : public Sensor {
public:
    Nvml(const std::string& where, std::int64_t gauges_ns)
        : library_(where), gauges_ns_(gauges_ns) {
        const unsigned count = library_.start();
        for (unsigned index = 0; index < count; ++index) find_gpu(index);
        probe();
        for (Gpu& gpu : gpus_) describe(gpu);
        if (channels_.empty()) throw nvml::nothing_found(notes_);
        values_.assign(channels_.size(), kUnknown);
    }

    void poll(double* out) noexcept override {
        const std::int64_t t_ns = now_ns();
        const bool all = t_ns >= gauges_due_ns_;
        if (all) gauges_due_ns_ = t_ns + gauges_ns_;
        double* values = values_.data();
        for (Gpu& gpu : gpus_) {
            // Where the counter is dead, energy is the integral of the power.
            const bool all_of_gpu = all || t_ns - gpu.counted_ns > kSilentNs;
            const std::size_t calls = all_of_gpu ? gpu.calls.size() : gpu.watched_calls;
            const std::size_t fields = all_of_gpu ? gpu.fields.size() : gpu.watched_fields;
            const double* const first = values;
            for (std::size_t i = 0; i < calls; ++i) ask(*gpu.calls[i], gpu.device, values[i]);
            values += gpu.calls.size();
            const nvmlReturn_t code =
                fields == 0
                    ? NVML_SUCCESS
                    : library_.fields(gpu.device, static_cast<int>(fields), gpu.fields.data());
            for (std::size_t i = 0; i < fields; ++i)
                values[i] = code == NVML_SUCCESS ? field_value(gpu.fields[i]) : kUnknown;
            values += gpu.fields.size();
            if (gpu.counter < 0) continue;
            const double counted = first[gpu.counter];
            if (counted > gpu.counted || counted < gpu.counted) gpu.counted_ns = t_ns;
            if (!std::isnan(counted)) gpu.counted = counted;
        }
        std::copy(values_.begin(), values_.end(), out);
    }

    void finish() noexcept override { gauges_due_ns_ = 0; }

private:
    struct Gpu : nvml::Board {
        std::array<nvmlReturn_t, kReadings.size()> answers;
        // What poll() reads, in the order of the channels. The first `watched` ones measure energy.
        std::vector<const Reading*> calls;
        std::vector<nvmlFieldValue_t> fields;
        std::size_t watched_calls = 0, watched_fields = 0;
        std::ptrdiff_t counter = -1;  // its place among them
        double counted = 0.0;
        std::int64_t counted_ns = std::numeric_limits<std::int64_t>::max();  // when it last changed
    };

    void note(const std::string& what, nvmlReturn_t code) {
        notes_.push_back(library_.note(what, code));
    }

    void find_gpu(unsigned index) {
        Gpu gpu{};
        const std::string number = std::to_string(index);
        const nvmlReturn_t code = nvml::open_board(library_, index, gpu);
        if (code != NVML_SUCCESS) return note("GPU " + number, code);
        if (gpu.mig)
            notes_.push_back({"energy of each MIG instance of GPU " + number,
                              "NVIDIA measures the whole board only",
                              "to have it undivided: sudo nvidia-smi -i " + number + " -mig 0"});
        gpu.answers.fill(NVML_ERROR_NOT_SUPPORTED);
        gpus_.push_back(std::move(gpu));
    }

    // Finds out which readings each GPU has. If it is polled faster than its sensor refreshes, a
    // driver may answer NOT_SUPPORTED once although the call works (zeus PR 186), so only a
    // repeated refusal counts. Each attempt asks all GPUs, so that the pauses do not add up.
    void probe() {
        for (int attempt = 0; attempt < kAttempts; ++attempt) {
            bool refused = false;
            for (Gpu& gpu : gpus_) {
                // Few boards are a module, and its power is in no total: ask once.
                const std::size_t asked = attempt == 0 ? kReadings.size() : kModule;
                for (std::size_t i = 0; i < asked; ++i) {
                    double value;
                    if (gpu.answers[i] == NVML_ERROR_NOT_SUPPORTED)
                        gpu.answers[i] = ask(kReadings[i], gpu.device, value);
                    refused |= i < kModule && gpu.answers[i] == NVML_ERROR_NOT_SUPPORTED;
                }
            }
            if (!refused) return;
            if (attempt + 1 < kAttempts) std::this_thread::sleep_for(kRetryAfter);
        }
    }

    void describe(Gpu& gpu) {
        // A reading that fails now but may work later is kept. It is unknown until then.
        const auto has = [&](std::size_t i) { return !nvml::is_permanent(gpu.answers[i]); };
        // PowerUsage repeats one of the fields where they exist. Which one depends on the chip.
        const bool fields = has(kInstant) || has(kAverage);
        const bool counted = has(kEnergyCall) || has(kEnergyField);
        // With the power of a module there is a counter that covers it (zeus 172), to which the
        // GPU's own limit does not apply.
        const bool module = has(kModule) || has(kModuleAverage);
        const std::string limit_w = most_power_w(gpu.device);
        for (std::size_t i = 0; i < kReadings.size(); ++i) {
            const Reading& reading = kReadings[i];
            if (gpu.answers[i] == NVML_ERROR_NO_PERMISSION)
                note(std::string(reading.name) + " of GPU " + gpu.labels["index"], gpu.answers[i]);
            if (!has(i) || (i == kPowerCall && fields) || (i == kEnergyField && has(kEnergyCall)))
                continue;
            // A module's counter does not say what its GPU took.
            const bool of_gpu = i == kPowerCall || i == kInstant || i == kAverage;
            const bool watched = reading.counter ||
                                 (!counted && i != kUtilisation && i != kMemory) ||
                                 (module && of_gpu);
            if (reading.call == Call::kField) {
                gpu.fields.push_back(request(reading));
                if (watched) gpu.watched_fields = gpu.fields.size();
            } else {
                gpu.calls.push_back(&reading);
                if (watched) gpu.watched_calls = gpu.calls.size();
            }
            auto labels = gpu.labels;
            if ((of_gpu || (reading.counter && !module)) && !limit_w.empty())
                labels["limit_w"] = limit_w;
            channels_.push_back({gpu.labels["uuid"] + "/" + reading.name, reading.quantity,
                                 reading.unit, reading.scale, 0.0, reading.counter, reading.source,
                                 std::move(labels)});
        }
        if (has(kEnergyCall) || has(kEnergyField)) {
            gpu.counter = has(kEnergyCall) ? 0 : static_cast<std::ptrdiff_t>(gpu.calls.size());
            gpu.counted_ns = now_ns();
        }
        if (!fields && !counted && !has(kPowerCall))
            notes_.push_back({"energy of GPU " + gpu.labels["index"] + ", " + gpu.labels["model"],
                              "it reports neither an energy counter nor power",
                              "none: its board has no sensor that the driver reads"});
    }

    // The highest limit that the board's power may be set to, W; empty if it states none.
    std::string most_power_w(nvmlDevice_t device) const {
        unsigned least_mw = 0, most_mw = 0, enforced_mw = 0;
        if (library_.limits && library_.limits(device, &least_mw, &most_mw) != NVML_SUCCESS)
            most_mw = 0;
        if (library_.enforced_limit &&
            library_.enforced_limit(device, &enforced_mw) != NVML_SUCCESS)
            enforced_mw = 0;
        most_mw = std::max(most_mw, enforced_mw);
        return most_mw > 0 ? std::to_string(most_mw / 1000) : "";
    }

    template <typename Raw, typename ToDouble>
    static nvmlReturn_t read(nvmlReturn_t (*function)(nvmlDevice_t, Raw*), nvmlDevice_t device,
                             double& value, ToDouble to_double) noexcept {
        Raw raw{};
        const nvmlReturn_t code =
            function != nullptr ? function(device, &raw) : NVML_ERROR_FUNCTION_NOT_FOUND;
        value = code == NVML_SUCCESS ? static_cast<double>(to_double(raw)) : kUnknown;
        return code;
    }

    nvmlReturn_t ask(const Reading& reading, nvmlDevice_t device, double& value) const noexcept {
        const auto plain = [](auto number) { return number; };
        const auto percent = [](const nvmlUtilization_t& rates) { return rates.gpu; };
        const auto used = [](const nvmlMemory_t& memory) { return memory.used; };
        switch (reading.call) {
            case Call::kEnergy: return read(library_.energy, device, value, plain);
            case Call::kPower: return read(library_.power, device, value, plain);
            case Call::kUtilisation: return read(library_.utilisation, device, value, percent);
            case Call::kMemory: return read(library_.memory, device, value, used);
            case Call::kField: break;
        }
        nvmlFieldValue_t field = request(reading);
        if (library_.fields == nullptr) return NVML_ERROR_FUNCTION_NOT_FOUND;
        const nvmlReturn_t code = library_.fields(device, 1, &field);
        return code == NVML_SUCCESS ? field.nvmlReturn : code;
    }

    static constexpr int kAttempts = 3;
    static constexpr std::chrono::milliseconds kRetryAfter{5};

    nvml::Library library_;
    std::vector<Gpu> gpus_;
    std::vector<double> values_;  // the driver's last answers, by channel
    std::int64_t gauges_ns_, gauges_due_ns_ = 0;
};

}  // namespace

std::unique_ptr<Sensor> open_nvml(const std::string& where) {
    return std::make_unique<Nvml>(where, kGaugesNs);
}

// Asks for everything at each poll, so that the refreshes of each gauge can be seen.
std::unique_ptr<Sensor> open_nvml_dense(const std::string& where) {
    return std::make_unique<Nvml>(where, 0);
}

}  // namespace pepr
