# The boot sector of a guest that reads its whole disk of 8 MiB through the BIOS, tries to write 64 sectors of it, and says
# on its serial port what came of both.
#
# The sum is over 32-bit words: turned left by one bit, then the word added.

        .code16
        .globl  _start
_start:
        ljmp    $0, $begin
begin:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $0x7c00, %sp
        cld
        movb    %dl, drive
read:
        movb    $0x42, %ah
        call    disk
        movw    $cannot_read, %si
        jc      last_words
        movw    $0x1000, %ax
        movw    %ax, %es
        xorw    %di, %di
        movw    $8192, %cx
word:
        movl    %es:(%di), %eax
        roll    $1, sum
        addl    %eax, sum
        addw    $4, %di
        loop    word
        addl    $64, first_sector
        decw    parts
        jnz     read

        movw    $read_it, %si
        call    say
        movw    $8, %cx
digit:
        roll    $4, sum
        movb    sum, %al
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     decimal
        addb    $'a' - '9' - 1, %al
decimal:
        call    say_byte
        loop    digit

        # What was read last, over the second 64 sectors.
        movl    $64, first_sector
        movw    $0x4300, %ax
        call    disk
        movw    $wrote, %si
        jnc     last_words
        movw    $cannot_write, %si
last_words:
        call    say
        # isa-debug-exit: QEMU ends with twice this and one.
        movw    $0x501, %dx
        movb    $2, %al
        outb    %al, %dx
halt:
        hlt
        jmp     halt

# Does what %ax says with 64 sectors; the carry tells of a failure.
disk:
        movb    drive, %dl
        movw    $packet, %si
        int     $0x13
        ret

# Says the text at %si, which ends with a zero.
say:
        lodsb
        testb   %al, %al
        jz      said
        call    say_byte
        jmp     say
said:
        ret

say_byte:
        pushw   %ax
        movw    $0x3fd, %dx
busy:
        inb     %dx, %al
        testb   $0x20, %al
        jz      busy
        popw    %ax
        movw    $0x3f8, %dx
        outb    %al, %dx
        ret

packet:         .byte   16, 0
                .word   64, 0, 0x1000
first_sector:   .long   0, 0
sum:            .long   0
parts:          .word   256
drive:          .byte   0
read_it:        .asciz  "guest: read, sum "
cannot_read:    .asciz  "guest: cannot read\n"
wrote:          .asciz  ", wrote\n"
cannot_write:   .asciz  ", cannot write\n"

        .org    510
        .word   0xaa55
