/* Calls kernels on a memory image, for tests/test_simd.py: qemu-aarch64 run < calls > image.
 *
 * The input is int64 numbers: the bytes of the image, the number of calls, then per call the kernel's index and ARGUMENTS pairs
 * (1 if an address inside the image, value). Then comes the image. It is written out when all calls are done. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define ARGUMENTS 20
#define A int64_t

/* Addresses and sizes alike come in 64-bit registers, then in 8-byte slots of the stack, whatever their number. */
typedef void kernel(A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A);
extern kernel *const kernels[];

static void get(void *to, size_t size) {
    if (fread(to, 1, size, stdin) != size) {
        fputs("the input ends early\n", stderr);
        exit(1);
    }
}

int main(void) {
    int64_t head[2];
    get(head, sizeof head);
    size_t call_size = (1 + 2 * ARGUMENTS) * sizeof(int64_t);
    int64_t *calls = malloc(head[1] * call_size);
    char *image = aligned_alloc(64, head[0]);
    if (!calls || !image) return 1;
    get(calls, head[1] * call_size);
    get(image, head[0]);
    for (int64_t i = 0; i < head[1]; i++) {
        int64_t *call = calls + i * (1 + 2 * ARGUMENTS), v[ARGUMENTS];
        for (int j = 0; j < ARGUMENTS; j++) v[j] = call[2 + 2 * j] + (call[1 + 2 * j] ? (int64_t)image : 0);
        kernels[call[0]](v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9],
                         v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17], v[18], v[19]);
    }
    return fwrite(image, 1, head[0], stdout) != (size_t)head[0];
}
