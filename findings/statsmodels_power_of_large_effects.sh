#!/usr/bin/env bash
# The power of a paired t-test is nan for large effects in statsmodels, with gaps, and a sample size cannot be solved.
#
# Expected: power grows with the effect and reaches 1. With 20 pairs it is 0.99999997 for an effect of 1.75 standard
# deviations, so it is 1.0 for larger ones.
# Seen (statsmodels 0.15.0, SciPy 1.17.1): nan for effects of 2.0 to 2.5, 1.0 for 2.75, nan for 3.0 to 4.5, 1.0 for
# 4.75. `solve_power` for an effect of 6 returns nan after a ConvergenceWarning; for an effect of 4 it returns 2.72
# pairs. The two tails are added, and `scipy.stats.nct.cdf` of the negligible one (below 1e-25) is nan or a number,
# depending on the last bits of its arguments, while `nct.sf` of the other one is 1.0 for all of these effects.
#
# Why it matters: differences between two methods of training are often several standard deviations of the differences
# between seeds. A program that plans seeds by this function has to treat a nan of the far tail as 0.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 300 MB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check statsmodels==0.15.0 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys
import warnings

from scipy.stats import nct, t
from statsmodels.stats.power import TTestPower

pairs = 20
effects = [1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 4.75]
power = {effect: float(TTestPower().power(effect, pairs, 0.05)) for effect in effects}
limit = t.ppf(0.975, pairs - 1)
near = {effect: float(nct.sf(limit, pairs - 1, effect * math.sqrt(pairs))) for effect in effects}
far = {effect: float(nct.cdf(-limit, pairs - 1, effect * math.sqrt(pairs))) for effect in effects}
for effect in effects:
    print(f"effect {effect}: power {power[effect]:.8f}, near tail {near[effect]:.8f}, far tail {far[effect]:.2g}")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    solved = {e: float(TTestPower().solve_power(effect_size=e, alpha=0.05, power=0.8)) for e in (4.0, 6.0)}
print(f"pairs for a power of 0.8: {solved[4.0]:.3f} for an effect of 4, {solved[6.0]} for 6")
undefined = [effect for effect in effects if math.isnan(power[effect])]
as_seen = (
    undefined == [2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 4.5]
    and any(math.isnan(value) for value in far.values())
    and min(near.values()) > 0.9999999
    and abs(solved[4.0] - 2.72) < 0.01
    and math.isnan(solved[6.0])
)
sys.exit(not as_seen)
PYTHON
