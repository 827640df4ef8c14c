/* Writes a line. */
void say(const char *text);
/* How many instructions have run, by fives; up to 83 million. */
unsigned instructions(void);
