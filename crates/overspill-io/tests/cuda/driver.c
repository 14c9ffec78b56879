// Stands for libcuda.so.1 in tests: does nothing, but notes every call in the file LOG, one line each, and answers as
// it was compiled to. Like the real one it keeps a stack of contexts for each thread, and refuses to register memory
// where that is empty.
#define _GNU_SOURCE
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/mman.h>

enum { FIRST_DEVICE = 40, INVALID_CONTEXT = 201 };

static _Thread_local int depth;

static void note(const char *format, ...) {
    FILE *log = fopen(LOG, "a");
    va_list values;
    va_start(values, format);
    vfprintf(log, format, values);
    va_end(values);
    fclose(log);
}

static const char *state(void *start) {
    unsigned char resident;
    return mincore(start, 1, &resident) == 0 ? "mapped" : "unmapped";
}

int cuInit(unsigned flags) {
    note("init %u\n", flags);
    return INIT;
}

int cuDeviceGetCount(int *count) {
    *count = DEVICES;
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = FIRST_DEVICE + ordinal;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    note("retain %d\n", device);
    *context = &depth;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    note("release %d\n", device);
    return 0;
}

int cuCtxPushCurrent_v2(void *context) {
    if (context == NULL)
        return INVALID_CONTEXT;
    note("push to %d\n", ++depth);
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    note("pop to %d\n", --depth);
    *context = &depth;
    return 0;
}

int cuMemHostRegister_v2(void *start, size_t bytes, unsigned flags) {
    if (depth == 0)
        return INVALID_CONTEXT;
    note("register %zx %zu %u %s\n", (size_t)start, bytes, flags, state(start));
    return REGISTER;
}

#ifndef OLD
int cuMemHostUnregister(void *start) {
    if (depth == 0)
        return INVALID_CONTEXT;
    note("unregister %zx %s\n", (size_t)start, state(start));
    return UNREGISTER;
}
#endif

#ifdef NAMES
int cuGetErrorName(int code, const char **name) {
    (void)code;
    *name = "CUDA_ERROR_OF_TESTS";
    return 0;
}
#endif
