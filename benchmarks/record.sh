#!/bin/sh
# Run the present recipe for an accuracy on CIFAR-10 with two processor cores (rules: docs/record.md).
#
#     benchmarks/record.sh DATA [TARGET]
#
# DATA has train.parquet and test.parquet. TARGET is the k-NN accuracy in percent: 65, 70 or 75. The lengths for 70 and 75
# are guesses that have not been run. A recipe of your own:
#     python benchmarks/record.py run DATA --target 75 --name NAME -- SETTINGS OF inbatch pretrain
set -eu
data=${1:?"usage: benchmarks/record.sh DATA [TARGET]"}
target=${2:-75}
fast="simclr --preset fast --set encoder.width=24"
case $target in
    65) recipe="$fast --epochs 4 --set evaluate_every=4" ;;
    70) recipe="$fast --epochs 16 --set evaluate_every=16" ;;
    75) recipe="$fast --epochs 60 --set evaluate_every=20" ;;
    *) echo "there is no recipe for $target %: give 65, 70 or 75" >&2; exit 2 ;;
esac
# shellcheck disable=SC2086 # the recipe is several words
exec python "$(dirname "$0")/record.py" run "$data" --target "$target" --name "record-$target" -- $recipe
