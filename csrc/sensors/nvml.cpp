// Every NVIDIA GPU of the machine, through the driver's own library, opened at run time: the same
// build runs with and without a driver. Devices are known by UUID; indices change across boots.

#include <array>
#include <chrono>
#include <optional>
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
        find(init, "nvmlInit_v2");
        find(shutdown, "nvmlShutdown");
        find(error_string, "nvmlErrorString");
        find(count, "nvmlDeviceGetCount_v2");
        find(by_index, "nvmlDeviceGetHandleByIndex_v2");
        find(uuid, "nvmlDeviceGetUUID");
        find(name, "nvmlDeviceGetName");
        find(energy, "nvmlDeviceGetTotalEnergyConsumption");
        find(power, "nvmlDeviceGetPowerUsage");
        find(fields, "nvmlDeviceGetFieldValues");
        find(utilisation, "nvmlDeviceGetUtilizationRates");
        find(memory, "nvmlDeviceGetMemoryInfo");
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

    template <typename F>
    void find(F& function, const char* symbol) {
        function = reinterpret_cast<F>(::dlsym(handle, symbol));
    }

    std::string describe(nvmlReturn_t code) const {
        const char* const text = error_string ? error_string(code) : "NVML error";
        return std::string(text) + " (" + std::to_string(static_cast<int>(code)) + ")";
    }

    void* handle = nullptr;
    bool started = false;
    decltype(&nvmlInit_v2) init;
    decltype(&nvmlShutdown) shutdown;
    decltype(&nvmlErrorString) error_string;
    decltype(&nvmlDeviceGetCount_v2) count;
    decltype(&nvmlDeviceGetHandleByIndex_v2) by_index;
    decltype(&nvmlDeviceGetUUID) uuid;
    decltype(&nvmlDeviceGetName) name;
    decltype(&nvmlDeviceGetTotalEnergyConsumption) energy;
    decltype(&nvmlDeviceGetPowerUsage) power;
    decltype(&nvmlDeviceGetFieldValues) fields;
    decltype(&nvmlDeviceGetUtilizationRates) utilisation;
    decltype(&nvmlDeviceGetMemoryInfo) memory;
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

std::optional<double> field_value(const nvmlFieldValue_t& field) noexcept {
    if (field.nvmlReturn != NVML_SUCCESS) return std::nullopt;
    switch (field.valueType) {
        case NVML_VALUE_TYPE_DOUBLE: return field.value.dVal;
        case NVML_VALUE_TYPE_UNSIGNED_INT: return field.value.uiVal;
        case NVML_VALUE_TYPE_UNSIGNED_LONG: return static_cast<double>(field.value.ulVal);
        case NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: return static_cast<double>(field.value.ullVal);
        case NVML_VALUE_TYPE_SIGNED_LONG_LONG: return static_cast<double>(field.value.sllVal);
        case NVML_VALUE_TYPE_SIGNED_INT: return field.value.siVal;
        default: return std::nullopt;
    }
}

class Nvml final : public Sensor {
public:
    explicit Nvml(const std::string& path) : library_(path.empty() ? kLibrary : path) {
        check(library_.init(), "NVML does not start");
        library_.started = true;
        unsigned count = 0;
        check(library_.count(&count), "NVML does not count its GPUs");
        for (unsigned index = 0; index < count; ++index) open_gpu(index);
        if (channels_.empty() && !notes_.empty())
            throw SensorError(notes_[0].what, notes_[0].why, notes_[0].fix);
        if (channels_.empty())
            throw SensorError("no NVIDIA GPU", "the driver runs but sees no device",
                              "check nvidia-smi -L, and NVIDIA_VISIBLE_DEVICES in a container");
    }

    void poll(double* out) noexcept override {
        for (const Gpu& gpu : gpus_) {
            if (gpu.energy) *out++ = read_energy(gpu.device);
            if (gpu.power) *out++ = read_power(gpu.device);
            if (gpu.n_fields > 0) {
                read_fields(gpu, out);
                out += gpu.n_fields;
            }
            if (gpu.utilisation) *out++ = read_utilisation(gpu.device);
            if (gpu.memory) *out++ = read_memory(gpu.device);
        }
    }

private:
    struct Field {
        unsigned id;
        const char* name;
        const char* source;
    };
    static constexpr std::array<Field, 2> kPowerFields{{
        {NVML_FI_DEV_POWER_INSTANT, "power_instant", "nvml-power-instant"},
        {NVML_FI_DEV_POWER_AVERAGE, "power_average", "nvml-power-average"},
    }};

    struct Gpu {
        nvmlDevice_t device;
        bool energy, power, utilisation, memory;
        int n_fields;
        std::array<unsigned, kPowerFields.size()> field_ids;
    };

    void check(nvmlReturn_t code, const std::string& what) const {
        if (code != NVML_SUCCESS) throw SensorError(what, library_.describe(code), remedy(code));
    }

    void open_gpu(unsigned index) {
        nvmlDevice_t device{};
        nvmlReturn_t code = library_.by_index(index, &device);
        std::array<char, NVML_DEVICE_UUID_V2_BUFFER_SIZE> uuid{}, name{};
        if (code == NVML_SUCCESS) code = library_.uuid(device, uuid.data(), uuid.size());
        if (code != NVML_SUCCESS) {
            notes_.push_back(
                {"GPU " + std::to_string(index), library_.describe(code), remedy(code)});
            return;
        }
        if (library_.name) library_.name(device, name.data(), name.size());
        const std::map<std::string, std::string> labels{
            {"uuid", uuid.data()}, {"model", name.data()}, {"index", std::to_string(index)}};
        const auto add = [&](const char* what, const char* quantity, const char* unit, double scale,
                             bool counter, const char* source) {
            channels_.push_back({std::string(uuid.data()) + "/" + what, quantity, unit, scale, 0.0,
                                 counter, source, labels});
        };

        Gpu gpu{device, false, false, false, false, 0, {}};
        unsigned long long millijoules = 0;
        unsigned milliwatts = 0;
        nvmlUtilization_t rates{};
        nvmlMemory_t memory{};
        gpu.energy = offers(library_.energy, device, &millijoules);
        if (gpu.energy) add("energy", "energy", "J", 1e-3, true, "nvml-energy");
        const auto fields = power_fields(device);
        // PowerUsage repeats one of the two fields where they exist (which one, depends on the
        // chip).
        gpu.power = fields.empty() && offers(library_.power, device, &milliwatts);
        if (gpu.power) add("power", "power", "W", 1e-3, false, "nvml-power");
        for (const Field& field : fields) {
            gpu.field_ids.at(static_cast<std::size_t>(gpu.n_fields++)) = field.id;
            add(field.name, "power", "W", 1e-3, false, field.source);
        }
        gpu.utilisation = offers(library_.utilisation, device, &rates);
        if (gpu.utilisation)
            add("utilisation", "utilisation", "1", 0.01, false, "nvml-utilisation");
        gpu.memory = offers(library_.memory, device, &memory);
        if (gpu.memory) add("memory_used", "memory", "B", 1.0, false, "nvml-memory");
        if (!gpu.energy && !gpu.power && fields.empty())
            notes_.push_back({"energy of " + std::string(name.data()) + " " + uuid.data(),
                              "this GPU reports neither an energy counter nor power",
                              "none: its board has no sensor that the driver reads"});
        gpus_.push_back(gpu);
    }

    // Polled faster than its sensor refreshes, a driver may answer NOT_SUPPORTED once where the
    // call works: only a repeated refusal counts. Any other failure may pass, and is kept as
    // unknown.
    template <typename Call, typename Value>
    static bool offers(Call call, nvmlDevice_t device, Value* value) {
        if (call == nullptr) return false;
        for (int attempt = 0; attempt < kAttempts; ++attempt) {
            if (call(device, value) != NVML_ERROR_NOT_SUPPORTED) return true;
            std::this_thread::sleep_for(kRetryAfter);
        }
        return false;
    }

    std::vector<Field> power_fields(nvmlDevice_t device) const {
        std::vector<Field> found;
        if (library_.fields == nullptr) return found;
        for (const Field& field : kPowerFields) {
            const auto call = [&](nvmlDevice_t gpu, nvmlFieldValue_t* value) {
                value->fieldId = field.id;
                const nvmlReturn_t code = library_.fields(gpu, 1, value);
                const nvmlReturn_t own = code == NVML_SUCCESS ? value->nvmlReturn : code;
                // A driver that does not know the field says so in one of these ways.
                return own == NVML_ERROR_INVALID_ARGUMENT || own == NVML_ERROR_FUNCTION_NOT_FOUND
                           ? NVML_ERROR_NOT_SUPPORTED
                           : own;
            };
            for (int attempt = 0; attempt < kAttempts; ++attempt) {
                nvmlFieldValue_t value{};
                if (call(device, &value) != NVML_ERROR_NOT_SUPPORTED) {
                    found.push_back(field);
                    break;
                }
                std::this_thread::sleep_for(kRetryAfter);
            }
        }
        return found;
    }

    double read_energy(nvmlDevice_t device) const noexcept {
        unsigned long long millijoules = 0;
        return library_.energy(device, &millijoules) == NVML_SUCCESS
                   ? static_cast<double>(millijoules)
                   : kUnknown;
    }
    double read_power(nvmlDevice_t device) const noexcept {
        unsigned milliwatts = 0;
        return library_.power(device, &milliwatts) == NVML_SUCCESS ? milliwatts : kUnknown;
    }
    void read_fields(const Gpu& gpu, double* out) const noexcept {
        std::array<nvmlFieldValue_t, kPowerFields.size()> values{};
        for (std::size_t i = 0; i < values.size(); ++i) values[i].fieldId = gpu.field_ids[i];
        const nvmlReturn_t code = library_.fields(gpu.device, gpu.n_fields, values.data());
        for (std::size_t i = 0; i < static_cast<std::size_t>(gpu.n_fields); ++i)
            out[i] = code == NVML_SUCCESS ? field_value(values[i]).value_or(kUnknown) : kUnknown;
    }
    double read_utilisation(nvmlDevice_t device) const noexcept {
        nvmlUtilization_t rates{};
        return library_.utilisation(device, &rates) == NVML_SUCCESS ? rates.gpu : kUnknown;
    }
    double read_memory(nvmlDevice_t device) const noexcept {
        nvmlMemory_t memory{};
        return library_.memory(device, &memory) == NVML_SUCCESS ? static_cast<double>(memory.used)
                                                                : kUnknown;
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
