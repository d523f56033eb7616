// A plugin of QEMU that prints how many instructions a program for aarch64 executes between its calls of getppid.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

// What this needs of qemu-plugin.h, which Debian does not install.
typedef uint64_t Plugin;
typedef struct qemu_plugin_tb Block;
int qemu_plugin_version = 1;
size_t qemu_plugin_tb_n_insns(const Block*);
void qemu_plugin_register_vcpu_tb_trans_cb(Plugin, void (*)(Plugin, Block*));
void qemu_plugin_register_vcpu_tb_exec_cb(Block*, void (*)(unsigned, void*), int flags, void*);
void qemu_plugin_register_vcpu_syscall_cb(Plugin, void (*)(Plugin, unsigned, int64_t, uint64_t, uint64_t, uint64_t,
                                                           uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

static uint64_t count;

static void execute(unsigned processor, void* instructions) { count += (uintptr_t)instructions; }

static void translate(Plugin plugin, Block* block) {
  qemu_plugin_register_vcpu_tb_exec_cb(block, execute, 0, (void*)qemu_plugin_tb_n_insns(block));
}

static void call(Plugin plugin, unsigned processor, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                 uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  if (number != 173) return;  // getppid
  printf("%llu\n", (unsigned long long)count);
  fflush(stdout);  // the program ends without it
  count = 0;
}

int qemu_plugin_install(Plugin plugin, const void* info, int size, char** words) {
  qemu_plugin_register_vcpu_tb_trans_cb(plugin, translate);
  qemu_plugin_register_vcpu_syscall_cb(plugin, call);
  return 0;
}
