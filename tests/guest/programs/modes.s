# A walk through the modes of the CPU: what a program finds there goes to port 0xe9, a number a line.
#
# Multiboot enters it in 32-bit protected mode. "@label" stands for the address of a label (the test
# replaces it), STUBS for the 256 entries of exceptions: error code or 0, vector, jump to `common`.
# An exception is logged (vector, error code, EIP, CS, EFLAGS, ESP and SS of an outer level, in
# virtual-8086 mode the data segments) and leads to the address kept at 0x202000. `int 0x80` logs EAX,
# EFLAGS inside and what its frame says, and returns.
start:
.long 0x1BADB002, 0x00010003, -(0x1BADB002+0x00010003)
.long @start, @start, 0, @end, @entry
.code32
entry:
 cld; movb $0xff,%al; outb %al,$0x21; outb %al,$0xa1
 movl $0x1F0000, %esp
 # clear data area 0x200000..0x230000
 movl $0x200000,%edi; movl $0xC000,%ecx; xorl %eax,%eax; rep stosl
 lgdt @gdtr
 ljmp $0x08, $@flat
flat:
 movl $0x10,%eax; movl %eax,%ds; movl %eax,%es; movl %eax,%ss; movl %eax,%fs; movl %eax,%gs
 # IDT at 0x200000
 movl $@stubs,%eax; xorl %ecx,%ecx; movl $0x200000,%edi
1: movl %eax,%edx; movw %dx,(%edi); movw $8,2(%edi); movw $0x8E00,4(%edi); shrl $16,%edx; movw %dx,6(%edi)
 addl $8,%edi; addl $16,%eax; incl %ecx; cmpl $256,%ecx; jne 1b
 movb $0xEE,0x200000+8*3+5; movb $0xEE,0x200000+8*4+5; movb $0xEF,0x200000+8*0x81+5
 # 0x80: DPL3 interrupt gate with iret; 0x81 trap gate; 0x82: 16-bit interrupt gate to code32 low? skip
 movl $@int80,%eax; movw %ax,0x200000+8*0x80; shrl $16,%eax; movw %ax,0x200000+8*0x80+6; movb $0xEE,0x200000+8*0x80+5
 movl $@int80,%eax; movw %ax,0x200000+8*0x81; shrl $16,%eax; movw %ax,0x200000+8*0x81+6
 lidt @idtr
 # TSS main at 0x201000
 movl $0x1E0000,0x201004; movl $0x10,0x201008; movw $0x68+32,0x201066
 movl $0x28,%eax; ltr %ax
 str %eax; call log
 movb 0x1000000,%al
 # --- INT from CPL 0 through an interrupt gate and a trap gate
 movl $0x1001,%eax; call log
 sti; int $0x80; cli; int $0x80; sti; int $0x81; cli
 # --- exceptions
 movl $0x1002,%eax; call log
 movl $@a1, 0x202000; movl $0x58,%eax; movl %eax,%es
a1: movl $@a2, 0x202000; movl $0x1234,%eax; movl %eax,%ds
a2: movl $@a3, 0x202000; movl $0x60,%eax; movl %eax,%ss
a3: movl $@a4, 0x202000; movl $0x60,%eax; movl %eax,%es; movb $1,%es:0x203000
a4: movl $@a5, 0x202000; movl $0x68,%eax; movl %eax,%es
a5: movl $@a6, 0x202000; movl $0x88,%eax; movl %eax,%fs; movl %fs:0xC,%eax; call log; movl %fs:0xD,%eax
a6: movl $@a7, 0x202000; movl $0x50,%eax; movl %eax,%gs; movl $0x77,%gs:0x1000; movl 0x1000,%eax; call log; movl %gs:0xFFF,%eax
a7: movl $@a8, 0x202000; ud2
a8: movl $@a9, 0x202000; xorl %ecx,%ecx; movl $5,%eax; xorl %edx,%edx; divl %ecx
a9: movl $@b1, 0x202000; int3
b1: movl $@b2, 0x202000; movl $0x7fffffff,%eax; addl $1,%eax; into
b2: movl $@b3, 0x202000; movl $5,0x203000; movl $9,0x203004; movl $7,%eax; bound %eax,0x203000; movl $0xB0,%eax; call log; movl $10,%eax; bound %eax,0x203000
b3: movl $@b4, 0x202000; int $0x77
b4: movl $@b5, 0x202000; ljmp $0x10,$0
b5: movl $@b6, 0x202000; lcall $0x0,$0
b6: movl $@b7, 0x202000; movl $0x58,%eax; lldt %ax
b7: movl $@b8, 0x202000; movl $0x78,%eax; lldt %ax; sldt %eax; call log; movl $0x04,%eax; movl %eax,%es; movl %es,%eax; call log; movl $0x10,%eax; movl %eax,%es; movl $0x0C,%eax; movl %eax,%es
b8: movl $0x10,%eax; movl %eax,%es
 # LAR LSL VERR VERW ARPL
 movl $0x1003,%eax; call log
 movl $0x50,%ecx; larl %ecx,%eax; setz %dl; call log; movzbl %dl,%eax; call log
 lsll %ecx,%eax; call log
 movl $0x88,%ecx; lsll %ecx,%eax; call log
 movl $0x28,%ecx; larl %ecx,%eax; call log; lsll %ecx,%eax; call log
 movl $0x38,%ecx; larl %ecx,%eax; call log
 xorl %eax,%eax; lsll %ecx,%eax; setz %al; call log
 movl $0x60,%ecx; verw %cx; setz %al; verr %cx; setz %ah; movzwl %ax,%eax; call log
 movl $0x68,%ecx; verr %cx; setz %al; movzbl %al,%eax; call log
 movl $0x10,%eax; movl $3,%ecx; arpl %cx,%ax; setz %cl; call log; movzbl %cl,%eax; call log
 # --- ring 3 and back: IRET outward, INT inward
 movl $0x1004,%eax; call log
 movl $@c1,0x202000
 pushl $0x23; pushl $0x1D0000; pushl $0x3202; pushl $0x1B; pushl $@user1; iret
user1:
 movl $0x23,%eax; movl %eax,%ds; movl %eax,%es
 int $0x80
 pushl $0x1111; pushl $0x2222
 lcall $0x3B,$0
 movl %esp,%eax; int $0x83-3+0   # 0x80 logs
 pushfl; popl %eax; int $0x80
 movl $0x10,%eax; movl %eax,%ds   # GP from CPL 3
c1: 
 movl $0x1005,%eax; call log
 # conforming code from ring 3, far return outward
 movl $@c2,0x202000
 pushl $0x23; pushl $0x1D0000; pushl $0x1B; pushl $@user2; lret
user2:
 lcall $0x70,$@conf
 movl $0x23,%ecx; movl %ecx,%ds
 cli
c2: movl $@c3,0x202000
 pushl $0x23; pushl $0x1D0000; pushl $2; pushl $0x1B; pushl $@user3; iret
user3: movl $0x23,%ecx; movl %ecx,%ds; inb $0x80,%al   # denied: IOPL 0, bitmap beyond
c3: movl $@c4,0x202000
 pushl $0x23; pushl $0x1D0000; pushl $2; pushl $0x1B; pushl $@user4; iret
user4: hlt
c4:
 # --- 16-bit segments: far call there and back, stack of 16 bits
 movl $0x1006,%eax; call log
 movl $@blob16,%esi; movl $0x7000,%edi; movl $(blob16_end-blob16),%ecx; rep movsb
 lcall $0x40,$0
 call log
 # --- task switches
 movl $0x1007,%eax; call log
 movl $0x204000,%edi; movl $@task2,0x20+0x204000; movl $2,0x24+0x204000
 movl $0x11111111,0x28+0x204000; movl $0x22222222,0x2C+0x204000; movl $0x1C0000,0x38+0x204000
 movl $0x10,0x48+0x204000; movl $8,0x4C+0x204000; movl $0x10,0x50+0x204000; movl $0x10,0x54+0x204000
 movl $0x10,0x58+0x204000; movl $0x10,0x5C+0x204000
 movl $0xAAAA,%ecx
 lcall $0x30,$0
 movl %cr0,%eax; andl $8,%eax; call log; clts
 str %eax; call log
 movb @gdt+0x35,%al; movzbl %al,%eax; call log
 movb @gdt+0x2d,%al; movzbl %al,%eax; call log
 pushfl; popl %eax; andl $0x4000,%eax; call log
 lcall $0x9B&0xF8,$0
 str %eax; call log; clts
 # task gate in the IDT
 movl $0x00300000,0x200000+8*0x90; movl $0x8500,0x200000+8*0x90+4
 int $0x90
 str %eax; call log; clts
 # --- virtual-8086 mode
 movl $0x1008,%eax; call log
 movl $@blobv,%esi; movl $0x8000,%edi; movl $(blobv_end-blobv),%ecx; rep movsb
 movl $@v1,0x202000
 pushl $0x700; pushl $0x600; pushl $0x500; pushl $0x400; pushl $0x800; pushl $0xF000; pushl $0x23202; pushl $0x800; pushl $0; iret
v1: movl $@v2,0x202000
 pushl $0x700; pushl $0x600; pushl $0x500; pushl $0x400; pushl $0x800; pushl $0xF000; pushl $0x20202; pushl $0x800; pushl $(v86b-blobv); iret
v2: movl $@v3,0x202000
 pushl $0x700; pushl $0x600; pushl $0x500; pushl $0x400; pushl $0x800; pushl $0xF000; pushl $0x23202; pushl $0x800; pushl $(v86c-blobv); iret
v3:
 # --- real mode
 movl $0x1009,%eax; call log
 movl $@blobr,%esi; movl $0x9000,%edi; movl $(blobr_end-blobr),%ecx; rep movsb
 movl %esp,0x202010
 lidt @idtr_real
 ljmp $0xA0,$0
back32:
 movl $0x10,%eax; movl %eax,%ds; movl %eax,%es; movl %eax,%ss; movl %eax,%fs; movl %eax,%gs
 movl 0x202010,%esp
 lidt @idtr
 movl $8,%ecx; movl $0x9800,%esi
1: lodsl; call log; loop 1b
 # --- paging: two levels with a large page and a read-only page
 movl $0x100A,%eax; call log
 movl $0x00000083,0x210000; movl $0x00211003,0x210004   # 0-4M large, 4-8M table
 movl $0x00220003,0x211000; movl $0x00221001,0x211004; movl $0x00222007,0x21100C
 movl %cr4,%eax; orl $0x10,%eax; movl %eax,%cr4
 movl $0x210000,%eax; movl %eax,%cr3
 movl %cr0,%eax; orl $0x80010000,%eax; movl %eax,%cr0
 movl $0x5A5A,0x400000; movl 0x220000,%eax; call log
 movl 0x211000,%eax; call log; movl 0x210004,%eax; call log; movl 0x210000,%eax; call log
 movl $@p1,0x202000; movl $1,0x401000
p1: movl %cr2,%eax; call log; movl $@p2,0x202000; movl 0x402000,%eax
p2: movl %cr2,%eax; call log; movl $@p3,0x202000; movl $0x8C00,%eax; movl 0x800000,%eax
p3: movl %cr2,%eax; call log
 movl %cr0,%eax; andl $0x7FFFFFFF,%eax; movl %eax,%cr0
 # --- PAE
 movl $0x100B,%eax; call log
 movl $0x00213001,0x212000; movl $0,0x212004; 
 movl $0x00000083,0x213000; movl $0,0x213004; movl $0x00200083,0x213008; movl $0,0x21300C
 movl $0x00214003,0x213010; movl $0,0x213014
 movl $0x00220003,0x214000; movl $0x80000000,0x214004
 movl $0x00221003,0x214008; movl $0x00000010,0x21400C
 movl $0xC0000080,%ecx; rdmsr; orl $0x800,%eax; wrmsr
 movl %cr4,%eax; orl $0x20,%eax; movl %eax,%cr4
 movl $0x212000,%eax; movl %eax,%cr3
 movl %cr0,%eax; orl $0x80000000,%eax; movl %eax,%cr0
 movl 0x400000,%eax; call log
 movl $@q1,0x202000; ljmp $8,$0x400000
q1: movl %cr2,%eax; call log; movl $@q2,0x202000; movl 0x600000,%eax
q2: movl %cr2,%eax; call log
 movl 0x214000,%eax; call log; movl 0x213010,%eax; call log
 movl %cr0,%eax; andl $0x7FFFFFFF,%eax; movl %eax,%cr0
 # --- long mode, 64-bit code and compatibility mode, and out again
 movl $0x100C,%eax; call log
 movl $0x00216003,0x215000; movl $0,0x215004
 movl $0x00213003,0x216000; movl $0,0x216004
 movl $0xC0000080,%ecx; rdmsr; orl $0x100,%eax; wrmsr
 movl $0x215000,%eax; movl %eax,%cr3
 movl %cr0,%eax; orl $0x80000000,%eax; movl %eax,%cr0
 rdmsr; andl $0xD00,%eax; call log
 ljmp $0x90,$@long64
.code64
long64:
 movabsq $0x123456789ABCDEF0,%rax
 shrq $32,%rax
 movq %rax,%rbx
 movq $0x1F0000,%rsp
 pushq $8
 movl $@compat,%eax
 pushq %rax
 lretq
.code32
compat:
 movl %ebx,%eax; call log
 movl %cr0,%eax; andl $0x7FFFFFFF,%eax; movl %eax,%cr0
 movl $0xC0000080,%ecx; rdmsr; andl $0xD00,%eax; call log
 rdmsr; andl $~0x100,%eax; wrmsr
 movl $0x100D,%eax; call log
 # decimal, pusha, xlat, string segments
 movl $0x0938,%eax; addb $0x45,%al; daa; call log; subb $0x27,%al; das; call log
 movl $0x020F,%eax; aaa; call log; aas; call log; aam $7; call log; aad $9; call log
 stc; .byte 0xd6; call log
 pushal; movl 4(%esp),%eax; popal; call log
 movl $5,%ecx; xorl %eax,%eax
1: addl %ecx,%eax; loop 1b
 call log
 movl $0x20003,%ecx
1: incl %eax; addr16 loop 1b
 call log; movl %ecx,%eax; call log
 movb $31,%al; outb %al,$0xf4
 cli; hlt

log: pushal
 movl $8,%ecx
1: roll $4,%eax; movl %eax,%edx; andl $15,%eax; addb $'0',%al; cmpb $'9',%al; jbe 2f; addb $39,%al
2: outb %al,$0xe9; movl %edx,%eax; loop 1b
 movb $10,%al; outb %al,$0xe9
 popal; ret

int80: pushl %eax; pushl %ds; pushl %es
 movl $0x10,%ecx; movl %ecx,%ds; movl %ecx,%es
 call log; pushfl; popl %eax; andl $0x7FD7,%eax; call log
 movl 16(%esp),%eax; call log; movl 20(%esp),%eax; andl $0x3F7FD7,%eax; call log
 testb $3,16(%esp); jz 1f
 movl 24(%esp),%eax; call log; movl 28(%esp),%eax; call log
1: popl %es; popl %ds; popl %eax; iret

gatecall: # 32-bit call gate, two parameters
 pushl %ds; movl $0x10,%ecx; movl %ecx,%ds
 movl %cs,%eax; call log; movl %esp,%eax; call log
 movl 12(%esp),%eax; call log; movl 16(%esp),%eax; call log; movl 20(%esp),%eax; call log; movl 24(%esp),%eax; call log
 popl %ds
 lret $8

conf: movl %cs,%eax; int $0x80; lret

common: # vector, error, eip, cs, eflags [esp ss]
 movl $0x10,%eax; movl %eax,%ds; movl %eax,%es
 movl (%esp),%eax; call log; movl 4(%esp),%eax; call log
 movl 8(%esp),%eax; call log; movl 12(%esp),%eax; call log; movl 16(%esp),%eax; andl $0x2E7FC0,%eax; call log
 testl $0x20000,16(%esp); jnz 2f
 testb $3,12(%esp); jz 1f
2: movl 20(%esp),%eax; call log; movl 24(%esp),%eax; call log
 testl $0x20000,16(%esp); jz 1f
 movl 28(%esp),%eax; call log; movl 32(%esp),%eax; call log; movl 36(%esp),%eax; call log; movl 40(%esp),%eax; call log
 movl %fs,%eax; call log; movl %gs,%eax; call log
1: movl $0x10,%eax; movl %eax,%ss; movl $0x1F0000,%esp
 jmp *0x202000

task2: pushl %eax; movl $0x2222,%eax; call log; popl %eax; call log
 pushfl; popl %eax; andl $0x4000,%eax; call log
 str %eax; call log; movzwl 0x204000,%eax; call log
 movl 0x201034,%eax; call log
 movb @gdt+0x2d,%al; movzbl %al,%eax; call log
 iret
 pushl %eax; movl $0x3333,%eax; call log; popl %eax; call log; iret
 movl $0x4444,%eax; call log; iret

.balign 16
stubs:
STUBS_

.balign 8
gdt: .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF
 .quad 0x0000892010000067 | ((0x64)<<0)*0, 0x0000892040000067
 .word (gatecall-start+0x100000)&0xffff, 8, 0xEC02, (gatecall-start+0x100000)>>16
 .quad 0x00009B007000FFFF, 0x000093000000FFFF, 0x00C0970000000000, 0x00CF13000000FFFF, 0x00CF91000000FFFF
 .quad 0x00CF99000000FFFF, 0x00CF9F000000FFFF, 0x0000822050000007
 .quad 0, 0x004093003000000F|0x2000000000, 0x00AF9B000000FFFF
 .quad 0x0000850000300000
 .quad 0x00009B009000FFFF
gdt_end:
gdtr: .word gdt_end-gdt-1; .long @gdt
.balign 8
idtr: .word 0x7FF; .long 0x200000
.balign 8
idtr_real: .word 0x3FF; .long 0

.code16
blob16: # at 7000, CS base 7000, called by a 32-bit far call
 movl %esp,%eax
 movl %eax,%edx
 movw $0x48,%ax; movw %ax,%ss; movw $0x6000,%sp
 pushw $0x1234; pushl $0x89ABCDEF; popw %bx; popw %cx; popw %si
 pushaw; movw 10(%bp),%ax; popaw
 enter $6,$1; leave
 callw sub16
 movw $0x10,%ax; movw %ax,%ss; movl %edx,%esp
 movzwl %bx,%eax; shll $16,%eax; movw %si,%ax
 lretl
sub16: addw $1,%si; retw
blob16_end:

blobv: # at 8000 as 0800:0000 in virtual-8086 mode, IOPL 3
 movw $0x1111,%ax; pushfw; popw %bx; pushw %cs; popw %cx
 movw $0x900,%dx; movw %dx,%ds; movb $0x5A,(0x10); movb %ds:(0x10),%dl
 cli; pushfw; popw %si; sti
 int $0x77
v86b: movw $0x2222,%ax; int $0x21   # IOPL 0: #GP
v86c: movw $0x3333,%ax; inb $0x70,%al; .byte 0x0f,0x0b
blobv_end:

blobr: # at 9000, still protected, 16-bit code with base 9000 (A0)
 movw $0x48,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss; movw %ax,%fs; movw %ax,%gs
 movl %cr0,%eax; andl $~1,%eax; movl %eax,%cr0
 ljmpw $0x900,$(real-blobr)
real: xorw %ax,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss; movl $0x6000,%esp
 movw $0x9800,%di; cld
 movl 0x18*4,%ebp
 movw $(isr-blobr),0x18*4; movw $0x900,0x18*4+2
 stc; sti; int $0x18; cli
 movl %ebp,0x18*4
 # far calls and returns; segment arithmetic
 lcallw $0x8FF,$(far-blobr+16)
 movl %ecx,%eax; stosl
 movw $0xFFFF,%ax; movw %ax,%fs; movl %fs:0x10,%eax; movl 0x0,%ebx; movl $0x100000,%eax; stosl
 movw $0x9000,%si; movl $4,%ecx; xorl %edx,%edx
1: lodsb; addb %al,%dl; loop 1b
 movzbl %dl,%eax; stosl
 movl %cr0,%eax; andl $1,%eax; stosl
 smsw %ax; andl $1,%eax; stosl
 lgdtl %cs:(gdtr16-blobr)
 movl %cr0,%eax; orl $1,%eax; movl %eax,%cr0
 ljmpl $8,$@back32
isr: pushaw; movw %sp,%bp; movw 20(%bp),%ax; movzwl %ax,%eax; stosl; movw 16(%bp),%ax; movzwl %ax,%eax; pushfw; popw %bx; shll $16,%ebx; orl %ebx,%eax; andl $0x0200FFFF,%eax; stosl; movw %di,%ax; popaw; movw $0x9808,%di; iretw
far: movw %sp,%bp; movw 2(%bp),%cx; shll $16,%ecx; movw (%bp),%cx; lretw
.balign 8
gdtr16: .word gdt_end-gdt-1; .long @gdt
blobr_end:
.code32
.balign 16
end:
