// Runs CUDA kernels on a CPU, slowly, behind the few functions of the CUDA libraries that cpm_kernels calls.
//
// The threads of a block are coroutines that take turns until all are through; where a warp or a block works
// together they wait for one another. The test writes the kernels behind this file, compiled for every TYPE, BITS
// and GROUP in a namespace of its own, and a table of them at the end.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <ucontext.h>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;

// ---- threads

struct dim3 { unsigned x, y, z; };
static dim3 blockIdx, threadIdx;
static std::vector<ucontext_t> contexts;
static std::vector<bool> finished;
static ucontext_t scheduler;
static std::size_t current;

static void let_others_run() { swapcontext(&contexts[current], &scheduler); }

struct Meeting {  // of `size` threads
    unsigned arrived = 0, round = 0;
    void wait(unsigned size) {
        const unsigned mine = round;
        if (++arrived == size) arrived = 0, round++;
        while (round == mine) let_others_run();
    }
};
static Meeting block_meeting, warp_meetings[32];

static void (*kernel)(void **);
static void **arguments;

static void run_thread() {
    kernel(arguments);
    finished[current] = true;
    while (true) let_others_run();
}

static void run_block(unsigned threads) {
    static std::vector<char> stacks;
    const std::size_t stack = 1 << 16;
    stacks.resize(threads * stack);
    contexts.assign(threads, ucontext_t{});
    finished.assign(threads, false);
    for (std::size_t i = 0; i < threads; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = &stacks[i * stack];
        contexts[i].uc_stack.ss_size = stack;
        makecontext(&contexts[i], run_thread, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (current = 0; current < threads; current++) {
            if (finished[current]) continue;
            running = true;
            threadIdx = {(unsigned)current, 0, 0};
            swapcontext(&scheduler, &contexts[current]);
        }
    }
}

// ---- what CUDA has built in

#define KERNEL static void
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct uint4 { u32 x, y, z, w; };

static uint4 __ldcs(const uint4 *p) {
    if ((uintptr_t)p % 16) abort();  // a card would refuse it, too
    return *p;
}
static float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
static int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
static void __syncthreads() { block_meeting.wait(contexts.size()); }

static u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}

static float __shfl_xor_sync(u32, float value, int other) {
    static float values[1024];
    values[current] = value;
    warp_meetings[current / 32].wait(32);
    const float result = values[current ^ other];
    warp_meetings[current / 32].wait(32);
    return result;
}

// ---- the instructions, as the PTX manual describes them

static float half_to_float(u16 bits) { _Float16 x; memcpy(&x, &bits, 2); return x; }
static u16 float_to_half(float value) { _Float16 x = value; u16 bits; memcpy(&bits, &x, 2); return bits; }

template <int TYPE> static float unpack(u32 pair, int which) {
    const u16 bits = pair >> 16 * which;
    return TYPE == 0 ? half_to_float(bits) : __int_as_float((int)((u32)bits << 16));
}

template <int TYPE> static u16 round_to(float x) {
    if (TYPE == 0) return float_to_half(x);
    const u32 bits = __float_as_int(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <int TYPE> static u32 multiply_add_of(u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 2; i++)
        d |= (u32)round_to<TYPE>(unpack<TYPE>(a, i) * unpack<TYPE>(b, i) + unpack<TYPE>(c, i)) << 16 * i;
    return d;
}

template <int TYPE> static void matrix_multiply_add_of(float *sums, const u32 *a, const u32 *b) {
    static u32 all_a[1024][4], all_b[1024][2];
    memcpy(all_a[current], a, 16);
    memcpy(all_b[current], b, 8);
    warp_meetings[current / 32].wait(32);
    const int warp = current / 32 * 32, lane = current % 32;
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int owner = k % 8 / 2, half = k % 2;
            const u32 left = all_a[warp + row % 8 * 4 + owner][row / 8 + 2 * (k / 8)];
            const u32 right = all_b[warp + column * 4 + owner][k / 8];
            sums[i] += unpack<TYPE>(left, half) * unpack<TYPE>(right, half);
        }
    }
    warp_meetings[current / 32].wait(32);
}
#define multiply_add multiply_add_of<TYPE>
#define matrix_multiply_add matrix_multiply_add_of<TYPE>

// ---- the libraries; a module is the text "unit_TYPE_BITS_GROUP"

struct Entry { const char *name; void (*function)(void **); };
static const Entry *find(const std::string &name);
template <typename T> static T get(void **arguments, int i) { return *(T *)arguments[i]; }

extern "C" {
int launches = 0;
const void *last_stream = nullptr;
const char *last_kernel = nullptr;

const char *cudaGetErrorString(int) { return "an error"; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaDeviceGetAttribute(int *value, int, int) { *value = 1; return 0; }
int cudaFree(void *) { return 0; }
std::size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void **handle) { *handle = &scheduler; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int, const char **text) { *text = "no such kernel"; return 0; }

int cuModuleLoadData(void **module, const char *image) {
    *module = new std::string(image);
    return 0;
}

int cuModuleGetFunction(const Entry **function, const std::string *module, const char *name) {
    *function = find(*module + " " + name);
    return *function ? 0 : 500;
}

int cuLaunchKernel(const Entry *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned, const void *stream, void **kernel_arguments, void **) {
    kernel = function->function;
    arguments = kernel_arguments;
    last_stream = stream;
    last_kernel = function->name;
    launches++;
    for (blockIdx.z = 0; blockIdx.z < z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) run_block(threads);
    return 0;
}
}
