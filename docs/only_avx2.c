/* A processor without AVX-512, for one process and all it starts, on Linux on x86:
 *
 *     cc -O2 -shared -fPIC only_avx2.c -o only_avx2.so
 *     LD_PRELOAD=$PWD/only_avx2.so python ...
 *
 * The processor is told to fault where a program asks what it can do (CPUID), and the answer is given here, without
 * AVX-512, VNNI and AMX. onnxruntime has no other switch. Where processor or system cannot do that, nothing changes, and
 * a line says so. What handles faults itself, as pytest's faulthandler does, is in the way.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static long answer_here(int here) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, (unsigned long)!here); }

static void answer(int sig, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)r[REG_RIP];
    uint32_t a = (uint32_t)r[REG_RAX], c = (uint32_t)r[REG_RCX], b, d, leaf = a, part = c;
    if (at[0] != 0x0f || at[1] != 0xa2) { /* a fault of another kind, which comes again */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    answer_here(0);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    answer_here(1);
    if (leaf == 7 && part == 0) {
        b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
        c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
        d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
    } else if (leaf == 7 && part == 1) {
        a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    static const char sorry[] = "only_avx2: this processor or system cannot hide AVX-512\n";
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, 0);
    if (answer_here(1) && write(2, sorry, sizeof sorry - 1) < 0) _exit(1);
}
