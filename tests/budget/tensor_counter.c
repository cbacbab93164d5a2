/* Preloaded, counts the bytes that torch's allocator for the CPU holds: every posix_memalign that
 * libc10 calls, and the free of each. oneDNN, which takes scratch memory in the same way, is in
 * another library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS (1u << 20)
static struct { void *address; size_t size; } table[SLOTS];  /* linear probing */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t live, peak, largest;
static int (*next_memalign)(void **, size_t, size_t);
static void (*next_free)(void *);

static size_t slot_of(void *address) {
    size_t slot = ((uintptr_t)address >> 6) * 2654435761u % SLOTS;
    while (table[slot].address && table[slot].address != address) slot = (slot + 1) % SLOTS;
    return slot;
}

static void forget(size_t slot) {
    live -= table[slot].size;
    table[slot].address = NULL;
    for (size_t later = (slot + 1) % SLOTS; table[later].address; later = (later + 1) % SLOTS) {
        void *address = table[later].address;
        size_t size = table[later].size;
        table[later].address = NULL;
        size_t home = slot_of(address);
        table[home].address = address;
        table[home].size = size;
    }
}

static uintptr_t low, high;  /* where libc10 is, once it is loaded */

static int find_libc10(struct dl_phdr_info *library, size_t size, void *unused) {
    if (!strstr(library->dlpi_name, "libc10.so")) return 0;
    low = UINTPTR_MAX;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        uintptr_t start = library->dlpi_addr + library->dlpi_phdr[i].p_vaddr;
        if (start < low) low = start;
        if (start + library->dlpi_phdr[i].p_memsz > high) high = start + library->dlpi_phdr[i].p_memsz;
    }
    return 1;
}

int posix_memalign(void **result, size_t alignment, size_t size) {
    if (!next_memalign) next_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    int error = next_memalign(result, alignment, size);
    uintptr_t caller = (uintptr_t)__builtin_return_address(0);
    if (!high) dl_iterate_phdr(find_libc10, NULL);
    if (!error && low <= caller && caller < high) {
        pthread_mutex_lock(&lock);
        size_t slot = slot_of(*result);
        table[slot].address = *result;
        table[slot].size = size;
        live += size;
        if (live > peak) peak = live;
        if ((int64_t)size > largest) largest = size;
        pthread_mutex_unlock(&lock);
    }
    return error;
}

void free(void *address) {
    if (!next_free) next_free = dlsym(RTLD_NEXT, "free");
    if (address && ((uintptr_t)address & 63) == 0) {  /* as torch aligns */
        pthread_mutex_lock(&lock);
        size_t slot = slot_of(address);
        if (table[slot].address) forget(slot);
        pthread_mutex_unlock(&lock);
    }
    next_free(address);
}

/* The highest live bytes since the last call, which begins anew. */
int64_t tensor_bytes_peak(void) {
    pthread_mutex_lock(&lock);
    int64_t found = peak;
    peak = live;
    pthread_mutex_unlock(&lock);
    return found;
}

int64_t tensor_bytes_live(void) { return live; }
int64_t tensor_bytes_largest(void) { int64_t found = largest; largest = 0; return found; }
