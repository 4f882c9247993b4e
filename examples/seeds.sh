#!/bin/sh
# The whole study: every model with three seeds on two data sets, ending in one page, study.html.
#
#   sh examples/seeds.sh [PAGE]        or: make study
#
# About six minutes on two idle cores. Its runs live in a store of their own, build/study (or STORE).
set -eu

page=${1:-study.html}
case $page in /*) ;; *) page=$PWD/$page ;; esac
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cd "$here/.."
PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH
if ! python -c 'import pepr_profiler._core, jinja2, matplotlib, sklearn, torch' 2>/dev/null; then
    echo "seeds.sh: installing pepr-profiler, torch, scikit-learn and matplotlib (once)" >&2
    venv=$(tools/setup.sh examples report)
    PATH=$venv/bin:$PATH
fi
store=${STORE:-build/study-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$store"

for data in digits breast_cancer; do
    models="logistic mlp_tiny mlp_small mlp_large resmlp resmlp_deep"
    if [ $data = digits ]; then models="$models cnn"; fi # tables are no images
    for seed in 0 1 2; do
        for model in $models; do
            echo "$data, $model, seed $seed" >&2
            pepr-profile --store "$store" --experiment "$data" --name "$model" \
                --metric accuracy='test acc: ([0-9.]+)' \
                -- python examples/train.py --data "$data" --model "$model" --seed "$seed" \
                --epochs 12 --profile >"$store.log" 2>&1 || {
                cat "$store.log" >&2
                exit 1
            }
        done
    done
done

pepr-profile compare --store "$store" --resource energy --resource time -o "$page"
echo "open $page in a browser" >&2
