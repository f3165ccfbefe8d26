"""All rows of the catalogue: planted, or why not."""

from mutants import advantages, losses, numerics, resume, scaling, tokens

TABLES = (numerics, tokens, advantages, losses, scaling, resume)
MUTANTS = tuple(mutant for table in TABLES for mutant in table.MUTANTS)
ELSEWHERE = {row: why for table in TABLES for row, why in table.ELSEWHERE.items()}
ROWS = """
L01 L03 L04 L05 L06 L08 L09 L11 L13 L14 L16 L17 L20 L22 L23
M01 M02 M03 M05 M07 M08 M10 M11 M13 M15 M16 M18 M20 M21 M22 M23 M25
A01 A02 A03 A05 A07 A08 A10 A12 A13 A14 A15 A17 A18 A20
P01 P02 P04 P06 P07 P08 P09 P10 P12 P13 P15 P17 P18 P20 P21 P23
D01 D02 D03 D04 D05 D07 D09 D11 D12 D14
R01 R02 R03 R04 R06 R07 R08 R12 R13
""".split()
