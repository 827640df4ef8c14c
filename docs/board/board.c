/* What starts a program on an MPS2 board with the image AN386, a Cortex-M4, as qemu emulates it. It has calls to the
   debugger, which qemu is here: write text, end. Under -icount shift=3 an instruction takes 8 ns, and the timer counts at
   25 MHz: one every 5 instructions. */
#include <stdint.h>
#include "board.h"
extern uint32_t top_of_stack;
int main(void);
static int debugger(int what, const void *with)
{
    register int r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = with;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}
void say(const char *text) { debugger(4, text); debugger(4, "\n"); }
#define TIMER ((volatile uint32_t *)0xE000E010)
unsigned instructions(void) { return 5u * (0xFFFFFFu - TIMER[2]); }
void start(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the floating-point unit */
    __asm__ volatile("dsb\n isb");
    TIMER[1] = 0xFFFFFF;
    TIMER[2] = 0;
    TIMER[0] = 5;
    main();
    debugger(0x18, (const void *)0x20026);
}
static void fault(void) { debugger(0x18, (const void *)0x20024); }
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &top_of_stack, (const void *)start, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault};
