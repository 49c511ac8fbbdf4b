"""The implicit methods, as data: a new method is a new entry of `IMPLICIT_TABLEAUS`.

tests/unit/methods/implicit/test_tableaus.py verifies orders, stability functions, and A- and L-stability. The methods
for fixed grids have the names of torchdiffeq's repository, where one of the nodes of gl4 is wrong.
"""

from __future__ import annotations

from fractions import Fraction

from node_cuda.methods.implicit.tableau import Dirk, FullyImplicit, Implicit, Rosenbrock
from node_cuda.methods.tableau import row, rows

_G3 = Fraction("0.4358665215084589994160194511935568425292")  # of 6 x^3 - 18 x^2 + 9 x - 1 = 0
_ROOT2 = Fraction("1.4142135623730950488016887242096980785696")
_ROOT3 = Fraction("1.7320508075688772935274463415058723669428")
_ROOT6 = Fraction("2.4494897427831780981972840747058913919659")
_ROOT15 = Fraction("3.8729833462074168851792653997823996108329")
_RODAS5P_M = row(
    "-7.502846399306121 2.561846144803919 -11.627539656261098 -0.18268767659942256 0.030198172008377946 1 1 1"
)
_KVAERNO3_Y3 = ((-4 * _G3**2 + 6 * _G3 - 1) / (4 * _G3), (1 - 2 * _G3) / (4 * _G3))
_KVAERNO5_Y6 = row("0.13855640231268224 0 -0.04245337201752043 0.02446657898003141 0.61943039072480676")
_TRBDF2_A = ((), (1 - _ROOT2 / 2,), (_ROOT2 / 4, _ROOT2 / 4))
_RADAU5_B = ((16 - _ROOT6) / 36, (16 + _ROOT6) / 36, Fraction(1, 9))

_ALL: tuple[Implicit, ...] = (
    Rosenbrock(
        "rodas5p",
        order=5,
        gamma=Fraction("0.21193756319429014"),
        a=(
            *rows(
                "",
                "3",
                "2.849394379747939 0.45842242204463923",
                "-6.954028509809101 2.489845061869568 -10.358996098473584",
                "2.8029986275628964 0.5072464736228206 -0.3988312541770524 -0.04721187230404641",
            ),
            _RODAS5P_M[:5],
            _RODAS5P_M[:6],
            _RODAS5P_M[:7],
        ),
        c=rows(
            "",
            "-14.155112264123755",
            "-17.97296035885952 -2.859693295451294",
            "147.12150275711716 -1.41221402718213 71.68940251302358",
            "165.43517024871676 -0.4592823456491126 42.90938336958603 -5.961986721573306",
            "24.854864614690072 -3.0009227002832186 47.4931110020768 5.5814197821558125 -0.6610691825249471",
            "30.91273214028599 -3.1208243349937974 77.79954646070892 34.28646028294783 -19.097331116725623"
            " -28.087943162872662",
            "37.80277123390563 -3.2571969029072276 112.26918849496327 66.9347231244047 -40.06618937091002"
            " -54.66780262877968 -9.48861652309627",
        ),
        m=_RODAS5P_M,
        e=row("0 0 0 0 0 0 0 1"),
        embedded_order=4,
        dense=rows(
            "25.948786856663858 -2.5579724845846235 10.433815404888879 -2.3679251022685204 0.524948541321073"
            " 1.1241088310450404 0.4272876194431874 -0.17202221070155493",
            "-9.91568850695171 -0.9689944594115154 3.0438037242978453 -24.495224566215796 20.176138334709044"
            " 15.98066361424651 -6.789040303419874 -6.710236069923372",
            "11.419903575922262 2.8879645146136994 72.92137995996029 80.12511834622643 -52.072871366152654"
            " -59.78993625266729 -0.15582684282751913 4.883087185713722",
        ),
        dense_order=4,
        source="Steinebach, BIT Numer. Math. 63 (2023) 27, doi 10.1007/s10543-023-00967-x; digits as in SciML's"
        " OrdinaryDiffEqRosenbrock",
        # A rejected step costs little, and no iteration depends on how even the steps are.
        defaults=dict(controller="I", safety=0.85),
    ),
    Dirk(
        "kvaerno3",
        order=3,
        gamma=_G3,
        a=(
            (),
            (_G3,),
            _KVAERNO3_Y3,
            (
                (6 * _G3 - 1) / (12 * _G3),
                -1 / ((24 * _G3 - 12) * _G3),
                (-6 * _G3**2 + 6 * _G3 - 1) / (6 * _G3 - 3),
            ),
        ),
        b_hat=(*_KVAERNO3_Y3, _G3, Fraction(0)),
        embedded_order=2,
        source="Kvaerno, BIT Numer. Math. 44 (2004) 489, ESDIRK 3/2 with gamma of the L-stable pair",
    ),
    Dirk(
        "kvaerno5",
        order=5,
        gamma=Fraction("0.26"),
        a=(
            *rows(
                "",
                "0.26",
                "0.13 0.84033320996790809",
                "0.22371961478320505 0.47675532319799699 -0.06470895363112615",
                "0.16648564323248321 0.10450018841591720 0.03631482272098715 -0.13090704451073998",
            ),
            _KVAERNO5_Y6,
            row(
                "0.13659751177640291 0 -0.05496908796538376 -0.04118626728321046 0.62993304899016403"
                " 0.06962479448202728"
            ),
        ),
        b_hat=(*_KVAERNO5_Y6, Fraction("0.26"), Fraction(0)),
        embedded_order=4,
        # The five conditions of order 4, and the value there of a component that is infinitely stiff stays bounded.
        b_mid=row(
            "0.16028092605109745218 0 0.01694176658372587781 -0.15184227818157179955 0.41597905902052959410"
            " 0.05864052652621890400 0"
        ),
        source="Kvaerno, BIT Numer. Math. 44 (2004) 489, ESDIRK 5/4 with gamma = 0.26; b_mid: solved for",
        # With longer steps Newton's iterations fail, and errors near the tolerance add up.
        defaults=dict(safety=0.8),
    ),
    Dirk(
        "trbdf2_adaptive",
        order=2,
        gamma=1 - _ROOT2 / 2,
        a=_TRBDF2_A,
        b_hat=((1 - _ROOT2 / 4) / 3, (3 * _ROOT2 / 4 + 1) / 3, (1 - _ROOT2 / 2) / 3),
        embedded_order=3,
        source="Hosea & Shampine, Appl. Numer. Math. 20 (1996) 21",
    ),
    # ---------------------------------------------------------------- on fixed grids
    Dirk(
        "implicit_euler",
        order=1,
        gamma=Fraction(1),
        a=((),),
        explicit_first=False,
        source="Hairer & Wanner II, IV.3",
    ),
    FullyImplicit(
        "implicit_midpoint",
        order=2,
        a=rows("1/2"),
        b=row("1"),
        source="Gauss with one stage: Hairer, Norsett & Wanner I, table II.7.1",
    ),
    Dirk(
        "trapezoid",
        order=2,
        gamma=Fraction(1, 2),
        a=rows("", "1/2"),
        source="Lobatto IIIA with two stages: Hairer & Wanner II, table IV.5.7",
    ),
    FullyImplicit(
        "radauIIA3",
        order=3,
        a=rows("5/12 -1/12", "3/4 1/4"),
        b=row("3/4 1/4"),
        source="Hairer & Wanner II, table IV.5.5",
    ),
    FullyImplicit(
        "gl4",
        order=4,
        a=((Fraction(1, 4), Fraction(1, 4) - _ROOT3 / 6), (Fraction(1, 4) + _ROOT3 / 6, Fraction(1, 4))),
        b=row("1/2 1/2"),
        source="Gauss with two stages: Hairer & Wanner II, table IV.5.1",
    ),
    FullyImplicit(
        "radauIIA5",
        order=5,
        a=(
            ((88 - 7 * _ROOT6) / 360, (296 - 169 * _ROOT6) / 1800, (-2 + 3 * _ROOT6) / 225),
            ((296 + 169 * _ROOT6) / 1800, (88 + 7 * _ROOT6) / 360, (-2 - 3 * _ROOT6) / 225),
            _RADAU5_B,
        ),
        b=_RADAU5_B,
        source="Hairer & Wanner II, table IV.5.6",
    ),
    FullyImplicit(
        "gl6",
        order=6,
        a=(
            (Fraction(5, 36), Fraction(2, 9) - _ROOT15 / 15, Fraction(5, 36) - _ROOT15 / 30),
            (Fraction(5, 36) + _ROOT15 / 24, Fraction(2, 9), Fraction(5, 36) - _ROOT15 / 24),
            (Fraction(5, 36) + _ROOT15 / 30, Fraction(2, 9) + _ROOT15 / 15, Fraction(5, 36)),
        ),
        b=row("5/18 4/9 5/18"),
        source="Gauss with three stages: Hairer & Wanner II, table IV.5.2",
    ),
    Dirk(
        "sdirk2",
        order=2,
        gamma=1 - _ROOT2 / 2,
        a=((), (_ROOT2 / 2,)),
        explicit_first=False,
        source="Alexander, SIAM J. Numer. Anal. 14 (1977) 1006, the method of order 2",
    ),
    Dirk(
        "trbdf2",
        order=2,
        gamma=1 - _ROOT2 / 2,
        a=_TRBDF2_A,
        source="Hosea & Shampine, Appl. Numer. Math. 20 (1996) 21, without the embedded solution",
    ),
)

IMPLICIT_TABLEAUS: dict[str, Implicit] = {tableau.name: tableau for tableau in _ALL}
