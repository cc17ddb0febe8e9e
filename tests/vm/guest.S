# A guest without an operating system, for Firecracker: it needs no drivers, and of KVM only what runs
# 64-bit code, so that it also runs where ordinary kernels do not. All state is in RAM. It takes
# one-letter commands on the serial console:
#   i  who I am: a nonce taken at boot, and the generation
#   d  dirty 1,500 scattered pages (first and last word), one generation on
#   z  write zeros to 200 whole pages, one generation on
#   c  a checksum over all 8,192 pages of the region, in order
#   s  the same, in an order in which hardly two neighbours follow each other
# The halves of the region may be anywhere in physical memory: assemble with --defsym LOW= and HIGH=,
# both multiples of 2 MiB.
.set REGION, 0x2000000
.set PAGES, 8192
.set STATE, 0x1100000
.ifndef LOW
.set LOW, REGION
.set HIGH, REGION + PAGES / 2 * 4096
.endif
.set HALF, PAGES / 2 / 512
.code64
.globl _start
.section .text
_start:
  mov $0x1200000, %rsp
  mov $STATE, %rbx
  rdtsc
  shl $32, %rdx
  or %rdx, %rax
  mov %rax, (%rbx)
  movq $0, 8(%rbx)
  # Firecracker's tables map the first GiB, in pages of 2 MiB: have those of the region show its halves
  mov %cr3, %rax
  and $-4096, %rax
  mov (%rax), %rax
  and $-4096, %rax
  mov (%rax), %rax
  and $-4096, %rax
  add $(REGION >> 21) * 8, %rax
  mov $LOW + 0x83, %rdx
  mov $HIGH + 0x83, %rsi
  mov $HALF, %rcx
map:
  mov %rdx, (%rax)
  mov %rsi, HALF * 8(%rax)
  add $8, %rax
  add $0x200000, %rdx
  add $0x200000, %rsi
  dec %rcx
  jnz map
  mov %cr3, %rax
  mov %rax, %cr3
  # fill the region once, so that the base has data there
  mov $REGION, %rdi
  mov $PAGES, %rcx
fill:
  mov %rdi, (%rdi)
  mov %rcx, 4088(%rdi)
  add $4096, %rdi
  dec %rcx
  jnz fill
  lea m_ready(%rip), %rsi
  call puts
loop:
  mov $0x3fd, %dx
wait:
  pause
  in %dx, %al
  test $1, %al
  jz wait
  mov $0x3f8, %dx
  in %dx, %al
  cmp $'i', %al
  je who
  cmp $'d', %al
  je dirty
  cmp $'z', %al
  je zero
  mov $1, %r8
  cmp $'c', %al
  je sum
  mov $2731, %r8
  cmp $'s', %al
  je sum
  jmp loop
who:
  lea m_who(%rip), %rsi
  call puts
  mov (%rbx), %rax
  call hex
  mov 8(%rbx), %rax
  call hex
  call nl
  jmp loop
dirty:
  incq 8(%rbx)
  xor %rcx, %rcx
d1:
  mov %rcx, %rax
  imul $97, %rax, %rax
  mov 8(%rbx), %rdx
  imul $31, %rdx, %rdx
  add %rdx, %rax
  and $(PAGES-1), %rax
  shl $12, %rax
  add $REGION, %rax
  mov 8(%rbx), %rdx
  shl $32, %rdx
  or %rcx, %rdx
  mov %rdx, (%rax)
  not %rdx
  mov %rdx, 4088(%rax)
  inc %rcx
  cmp $1500, %rcx
  jb d1
  lea m_done(%rip), %rsi
  call puts
  jmp loop
zero:
  incq 8(%rbx)
  xor %r8, %r8
z1:
  mov %r8, %rdi
  imul $41, %rdi, %rdi
  mov 8(%rbx), %rdx
  imul $17, %rdx, %rdx
  add %rdx, %rdi
  and $(PAGES-1), %rdi
  shl $12, %rdi
  add $REGION, %rdi
  xor %rax, %rax
  mov $512, %rcx
z2:
  mov %rax, (%rdi)
  add $8, %rdi
  dec %rcx
  jnz z2
  inc %r8
  cmp $200, %r8
  jb z1
  lea m_done(%rip), %rsi
  call puts
  jmp loop
sum:
  xor %rdx, %rdx
  mov $PAGES, %rcx
  xor %rax, %rax
s1:
  mov %rdx, %rdi
  shl $12, %rdi
  add $REGION, %rdi
  rol $5, %rax
  xor (%rdi), %rax
  rol $7, %rax
  add 4088(%rdi), %rax
  add %r8, %rdx
  and $(PAGES-1), %rdx
  dec %rcx
  jnz s1
  push %rax
  lea m_sum(%rip), %rsi
  call puts
  pop %rax
  call hex
  call nl
  jmp loop
puts:
  mov $0x3f8, %dx
p1:
  mov (%rsi), %al
  test %al, %al
  jz p2
  out %al, %dx
  inc %rsi
  jmp p1
p2:
  ret
nl:
  mov $10, %al
  mov $0x3f8, %dx
  out %al, %dx
  ret
hex:
  mov %rax, %r9
  mov $16, %r10
  mov $' ', %al
  mov $0x3f8, %dx
  out %al, %dx
h1:
  rol $4, %r9
  mov %r9, %rax
  and $15, %al
  cmp $10, %al
  jb h2
  add $39, %al
h2:
  add $48, %al
  mov $0x3f8, %dx
  out %al, %dx
  dec %r10
  jnz h1
  ret
m_ready: .asciz "READY\n"
m_who: .asciz "WHO"
m_done: .asciz "DONE\n"
m_sum: .asciz "SUM"
