// A model in miniature for the C++ programs beside it: the driver API alone, no runtime, no toolkit.
//
// UCM_CUDA_LIBRARY names another libcuda.so.1, for the programs as for the store.
#ifndef UCM_TESTS_GPU_HPP
#define UCM_TESTS_GPU_HPP

#include <ucm.hpp>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

[[noreturn]] inline void fail(const std::string &sentence) {
    std::fprintf(stderr, "FAILED: %s\n", sentence.c_str());
    std::exit(1);
}

inline void check(bool holds, const std::string &sentence) {
    if (!holds) fail(sentence);
}

// The driver, with the primary context of device 0 current on this thread.
class Gpu {
public:
    explicit Gpu(const std::string &model) {
        const char *other = std::getenv("UCM_CUDA_LIBRARY");
        library_ = dlopen(other != nullptr ? other : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        check(library_ != nullptr, "libcuda.so.1 cannot be loaded: this program needs an NVIDIA GPU");
        call<unsigned>("cuInit", 0);
        call<void **, int>("cuDevicePrimaryCtxRetain", &context_, 0);
        enter();
        std::ifstream file(model);
        std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        check(!image.empty(), model + " cannot be read");
        void *module = nullptr;
        call<void **, const void *>("cuModuleLoadData", &module, image.c_str());
        call<void **, void *, const char *>("cuModuleGetFunction", &slow_fill_, module, "slow_fill");
    }

    void enter() { call<void *>("cuCtxSetCurrent", context_); }

    // A function of the driver that must succeed.
    template <typename... Types>
    void call(const char *name, Types... arguments) {
        const int status = attempt<Types...>(name, arguments...);
        check(status == 0, std::string(name) + " failed with " + std::to_string(status));
    }

    template <typename... Types>
    int attempt(const char *name, Types... arguments) {
        auto function = reinterpret_cast<int (*)(Types...)>(dlsym(library_, name));
        check(function != nullptr, std::string("the driver has no ") + name);
        return function(arguments...);
    }

    unsigned long long allocate(std::size_t bytes) {
        unsigned long long address = 0;
        call<unsigned long long *, std::size_t>("cuMemAlloc_v2", &address, bytes);
        return address;
    }

    // 0: waits for the default stream, as cudaStreamCreate's do; 1: does not.
    void *stream(unsigned flags) {
        void *made = nullptr;
        call<void **, unsigned>("cuStreamCreate", &made, flags);
        return made;
    }

    void *event() {
        void *made = nullptr;
        call<void **, unsigned>("cuEventCreate", &made, 2);
        return made;
    }

    void record(void *event, void *stream) { call<void *, void *>("cuEventRecord", event, stream); }
    void destroy(void *event) { call<void *>("cuEventDestroy_v2", event); }
    void destroy_stream(void *stream) { call<void *>("cuStreamDestroy_v2", stream); }
    void free(unsigned long long address) { call<unsigned long long>("cuMemFree_v2", address); }
    void synchronize() { call<>("cuCtxSynchronize"); }

    // Waits `cycles`, then fills the words of `to` with what `filled` says.
    void fill(void *stream, unsigned long long to, std::size_t bytes, unsigned seed, unsigned long long cycles) {
        auto words = static_cast<unsigned>(bytes / 4);
        void *arguments[] = {&to, &words, &seed, &cycles};
        call<void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **>(
            "cuLaunchKernel", slow_fill_, 32, 1, 1, 256, 1, 1, 0, stream, arguments, nullptr);
    }

    std::vector<unsigned> read(unsigned long long from, std::size_t bytes) {
        std::vector<unsigned> words(bytes / 4);
        call<void *, unsigned long long, std::size_t>("cuMemcpyDtoH_v2", words.data(), from, bytes);
        return words;
    }

private:
    void *library_ = nullptr;
    void *context_ = nullptr;
    void *slow_fill_ = nullptr;
};

// What `fill` writes.
inline unsigned filled(std::size_t word, unsigned seed) { return static_cast<unsigned>(word) * 2654435761u + seed; }

// A full queue says so; whoever asks again gets in.
template <typename Submit>
ucm::Task submit(Submit submit) {
    for (;;) {
        auto submitted = submit();
        if (submitted) return std::move(submitted).value();
        check(submitted.status() == ucm::Status::Busy, submitted.error().message());
        std::this_thread::yield();
    }
}

#endif
