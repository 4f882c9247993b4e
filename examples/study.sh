#!/bin/sh
# Train every model as one experiment and rank them by PePR: about two minutes on two cores.
#
#   sh examples/study.sh [digits|breast_cancer] [EXPERIMENT]
#
# Installs what it needs into the active virtual environment, or into .venv, where it is missing.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cd "$here/.."
PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH
# Whether all is installed, and the core that would be used is not older than its sources.
ready='
import pathlib, pepr_profiler._core as core, sklearn, torch
built_s = pathlib.Path(core.__file__).stat().st_mtime
assert all(path.stat().st_mtime <= built_s for path in pathlib.Path("csrc").rglob("*.*"))'
if ! python -c "$ready" 2>/dev/null; then
    echo "study.sh: installing pepr-profiler, torch and scikit-learn (once)" >&2
    in_place=
    [ -z "$(find pepr_profiler -name '_core*.so')" ] || in_place=-e
    # shellcheck disable=SC2086
    venv=$(tools/setup.sh $in_place examples)
    PATH=$venv/bin:$PATH
fi
data=${1:-digits}
experiment=${2:-$data-$(date +%Y%m%d-%H%M%S)}

case $data in
digits) models="logistic mlp_small mlp_large resmlp cnn" ;;
breast_cancer) models="logistic mlp_small mlp_large resmlp" ;; # tables are no images
*)
    echo "study.sh: no data called '$data'; choose digits or breast_cancer" >&2
    exit 2
    ;;
esac

for model in $models; do
    pepr-profile --experiment "$experiment" --name "$model" \
        --metric accuracy='test acc: ([0-9.]+)' \
        -- python examples/train.py --data "$data" --model "$model" --profile
done

pepr-profile compare --experiment "$experiment"
