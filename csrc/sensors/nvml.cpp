// Every NVIDIA GPU of the machine, through the driver's own library, opened at run time: the same
// build runs with and without a driver. Devices are known by UUID; indices change across boots.

#include <array>
#include <chrono>
#include <thread>

#include <dlfcn.h>
#include <nvml.h>

#include "../sensor.h"

namespace pepr {

namespace {

constexpr const char* kLibrary = "libnvidia-ml.so.1";

// nvml.h renames calls to their newest version by macro; a symbol is looked up by its real name,
// and one that the driver is too old for stays null.
struct Library {
    explicit Library(const std::string& path)
        : handle(::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        if (handle == nullptr) {
            const char* const reason = ::dlerror();
            throw SensorError("no NVIDIA driver library", reason != nullptr ? reason : path,
                              "install the NVIDIA driver; in a container, start it with GPU access "
                              "(docker run --gpus all)");
        }
        if (!init || !shutdown || !count || !by_index || !uuid)
            throw SensorError(path + " is not a usable NVML",
                              "it lacks calls that every driver since 2013 has",
                              "check the path after nvml:, or update the driver");
    }
    ~Library() {
        if (started) shutdown();
        if (handle != nullptr) ::dlclose(handle);
    }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    struct Symbol {
        void* address;
        template <typename F>
        operator F*() const {
            return reinterpret_cast<F*>(address);
        }
    };
    Symbol find(const char* symbol) const { return {handle ? ::dlsym(handle, symbol) : nullptr}; }

    std::string describe(nvmlReturn_t code) const {
        const char* const text = error_string ? error_string(code) : "NVML error";
        return std::string(code == NVML_ERROR_NO_PERMISSION ? kDenied : "") + text + " (" +
               std::to_string(static_cast<int>(code)) + ")";
    }

    void* handle = nullptr;
    bool started = false;
    decltype(&nvmlInit_v2) init = find("nvmlInit_v2");
    decltype(&nvmlShutdown) shutdown = find("nvmlShutdown");
    decltype(&nvmlErrorString) error_string = find("nvmlErrorString");
    decltype(&nvmlDeviceGetCount_v2) count = find("nvmlDeviceGetCount_v2");
    decltype(&nvmlDeviceGetHandleByIndex_v2) by_index = find("nvmlDeviceGetHandleByIndex_v2");
    decltype(&nvmlDeviceGetUUID) uuid = find("nvmlDeviceGetUUID");
    decltype(&nvmlDeviceGetName) name = find("nvmlDeviceGetName");
    decltype(&nvmlDeviceGetTotalEnergyConsumption) energy =
        find("nvmlDeviceGetTotalEnergyConsumption");
    decltype(&nvmlDeviceGetPowerUsage) power = find("nvmlDeviceGetPowerUsage");
    decltype(&nvmlDeviceGetFieldValues) fields = find("nvmlDeviceGetFieldValues");
    decltype(&nvmlDeviceGetUtilizationRates) utilisation = find("nvmlDeviceGetUtilizationRates");
    decltype(&nvmlDeviceGetMemoryInfo) memory = find("nvmlDeviceGetMemoryInfo");
    decltype(&nvmlDeviceGetMigMode) mig = find("nvmlDeviceGetMigMode");
};

std::string remedy(nvmlReturn_t code) {
    switch (code) {
        case NVML_ERROR_DRIVER_NOT_LOADED: return "load it: sudo modprobe nvidia";
        case NVML_ERROR_NO_PERMISSION:
            return "give this user access to /dev/nvidia* (group video or render)";
        case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return "the library is newer than the loaded kernel module: reboot, or reload the "
                   "nvidia modules";
        case NVML_ERROR_GPU_IS_LOST:
        case NVML_ERROR_RESET_REQUIRED: return "reset the GPU (nvidia-smi --gpu-reset) or reboot";
        default: return "see that nvidia-smi works";
    }
}

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
enum : std::size_t { kEnergyCall, kPowerCall, kEnergyField = 4, kInstant, kAverage, kModule };

nvmlFieldValue_t request(const Reading& reading) noexcept {
    nvmlFieldValue_t field{};
    field.fieldId = reading.field;
    field.scopeId = reading.scope;
    return field;
}

class Nvml final : public Sensor {
public:
    explicit Nvml(const std::string& path) : library_(path.empty() ? kLibrary : path) {
        check(library_.init(), "NVML does not start");
        library_.started = true;
        unsigned count = 0;
        check(library_.count(&count), "NVML does not count its GPUs");
        for (unsigned index = 0; index < count; ++index) find_gpu(index);
        probe();
        for (Gpu& gpu : gpus_) describe(gpu);
        if (channels_.empty() && !notes_.empty())
            throw SensorError(notes_[0].what, notes_[0].why, notes_[0].fix);
        if (channels_.empty())
            throw SensorError("no NVIDIA GPU", "the driver runs but sees no device",
                              "check nvidia-smi -L, and NVIDIA_VISIBLE_DEVICES in a container");
    }

    void poll(double* out) noexcept override {
        for (Gpu& gpu : gpus_) {
            for (const Reading* reading : gpu.calls) ask(*reading, gpu.device, *out++);
            if (gpu.fields.empty()) continue;
            const nvmlReturn_t code =
                library_.fields(gpu.device, static_cast<int>(gpu.fields.size()), gpu.fields.data());
            for (const nvmlFieldValue_t& field : gpu.fields)
                *out++ = code == NVML_SUCCESS ? field_value(field) : kUnknown;
        }
    }

private:
    struct Gpu {
        nvmlDevice_t device;
        std::map<std::string, std::string> labels;
        std::array<nvmlReturn_t, kReadings.size()> answers;
        std::vector<const Reading*> calls;  // what poll() reads, in the order of the channels
        std::vector<nvmlFieldValue_t> fields;
    };

    void check(nvmlReturn_t code, const std::string& what) const {
        if (code != NVML_SUCCESS) throw SensorError(what, library_.describe(code), remedy(code));
    }

    void note(const std::string& what, nvmlReturn_t code) {
        notes_.push_back({what, library_.describe(code), remedy(code)});
    }

    void find_gpu(unsigned index) {
        Gpu gpu{};
        nvmlReturn_t code = library_.by_index(index, &gpu.device);
        std::array<char, NVML_DEVICE_UUID_V2_BUFFER_SIZE> uuid{}, name{};
        if (code == NVML_SUCCESS) code = library_.uuid(gpu.device, uuid.data(), uuid.size());
        const std::string number = std::to_string(index);
        if (code != NVML_SUCCESS) return note("GPU " + number, code);
        if (library_.name) library_.name(gpu.device, name.data(), name.size());
        gpu.labels = {{"uuid", uuid.data()}, {"model", name.data()}, {"index", number}};
        unsigned mig = NVML_DEVICE_MIG_DISABLE, pending = 0;
        if (library_.mig && library_.mig(gpu.device, &mig, &pending) == NVML_SUCCESS &&
            mig == NVML_DEVICE_MIG_ENABLE) {
            gpu.labels["mig"] = "on";
            notes_.push_back({"energy of each MIG instance of GPU " + number,
                              "NVIDIA measures the whole board only",
                              "to have it undivided: sudo nvidia-smi -i " + number + " -mig 0"});
        }
        gpu.answers.fill(NVML_ERROR_NOT_SUPPORTED);
        gpus_.push_back(std::move(gpu));
    }

    // Polled faster than its sensor refreshes, a driver may answer NOT_SUPPORTED once where the
    // call works (zeus PR 186): only a repeated refusal counts. All are asked before any is asked
    // again, so that the pauses do not add up over calls and GPUs.
    void probe() {
        for (int attempt = 0; attempt < kAttempts; ++attempt) {
            bool refused = false;
            for (Gpu& gpu : gpus_) {
                // Few boards are a module, and its power is in no total: once is enough.
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

    // Failures that may pass (a GPU that is lost, a time-out) are kept: unknown until they do.
    static bool offered(nvmlReturn_t answer) {
        return answer != NVML_ERROR_NOT_SUPPORTED && answer != NVML_ERROR_FUNCTION_NOT_FOUND &&
               answer != NVML_ERROR_INVALID_ARGUMENT && answer != NVML_ERROR_NO_PERMISSION;
    }

    void describe(Gpu& gpu) {
        const auto has = [&](std::size_t i) { return offered(gpu.answers[i]); };
        // PowerUsage repeats one of the fields where they exist; which one, depends on the chip.
        const bool fields = has(kInstant) || has(kAverage);
        for (std::size_t i = 0; i < kReadings.size(); ++i) {
            const Reading& reading = kReadings[i];
            if (gpu.answers[i] == NVML_ERROR_NO_PERMISSION)
                note(std::string(reading.name) + " of GPU " + gpu.labels["index"], gpu.answers[i]);
            if (!has(i) || (i == kPowerCall && fields) || (i == kEnergyField && has(kEnergyCall)))
                continue;
            if (reading.call == Call::kField)
                gpu.fields.push_back(request(reading));
            else
                gpu.calls.push_back(&reading);
            channels_.push_back({gpu.labels["uuid"] + "/" + reading.name, reading.quantity,
                                 reading.unit, reading.scale, 0.0, reading.counter, reading.source,
                                 gpu.labels});
        }
        if (!fields && !has(kEnergyCall) && !has(kEnergyField) && !has(kPowerCall))
            notes_.push_back({"energy of GPU " + gpu.labels["index"] + ", " + gpu.labels["model"],
                              "it reports neither an energy counter nor power",
                              "none: its board has no sensor that the driver reads"});
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

    Library library_;
    std::vector<Gpu> gpus_;
};

}  // namespace

std::unique_ptr<Sensor> open_nvml(const std::string& where) {
    return std::make_unique<Nvml>(where);
}

}  // namespace pepr
