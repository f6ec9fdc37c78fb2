"""What is read from disassembled kernels."""

from __future__ import annotations

import pytest

from msd_kernels.tools import machine_code

DISASSEMBLY = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;    /* a loop around the others */
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64] ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/              @P1  BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   LDS R3, [R2] ;
        /*00a0*/              @P1  BRA `(.L_x_3) ;
        /*00b0*/              @!P2 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
"""


def test_innermost_loops_are_those_that_multiply():
    loops = machine_code.innermost_loops(DISASSEMBLY)
    assert [len(loop) for loop in loops] == [5, 2]
    assert loops[0][0].startswith("LDGSTS")
    assert loops[0][-1].endswith("BRA `(.L_x_1) ;")


def test_issue_is_that_of_the_loop_that_multiplies_most(monkeypatch):
    monkeypatch.setattr(machine_code, "run_on", lambda *_: DISASSEMBLY)
    assert machine_code.issue_share(b"", 90) == 5 / 16


def test_issue_is_unknown_without_tensor_cores(monkeypatch):
    monkeypatch.setattr(machine_code, "run_on", lambda *_: DISASSEMBLY.replace("HGMMA", "FFMA"))
    assert machine_code.issue_share(b"", 90) == 0


@pytest.mark.parametrize(
    ("instruction", "architecture", "cycles"),
    [
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;", 90, 128),
        ("HGMMA.64x128x8.F32.TF32 R24, gdesc[UR8].tnspB, R24, gsb0 ;", 90, 64),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4 ;", 80, 8),
        ("HMMA.1688.F32.TF32 R4, R8, R10, R4 ;", 80, 8),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4 ;", 100, 0),
        ("FFMA R4, R8, R10, R4 ;", 80, 0),
    ],
)
def test_cycles_of_tensor_cores(instruction, architecture, cycles):
    assert machine_code.tensor_cycles(instruction, architecture) == cycles
