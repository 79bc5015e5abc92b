#!/bin/sh
# Run notebooks from top to bottom, each in a kernel of its own; `make notebooks` and `make figures` call this.
#   run_notebooks.sh FOLDER NOTEBOOK…       executed copies and their HTML go to FOLDER
#   run_notebooks.sh --in-place NOTEBOOK…   a notebook is replaced by its executed copy, once that ran to its end
# Exit status: 0 if all ran to their end, else 1.
set -u
python=${PYTHON:-python3}
folder=$1
shift
out=$folder
if [ "$folder" = --in-place ]; then out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT; fi
# No time stamps and no version of Python in the file: they would change with every rendering.
plain="--ExecutePreprocessor.record_timing=False --ClearMetadataPreprocessor.enabled=True
  --ClearMetadataPreprocessor.clear_cell_metadata=False"
kept='--ClearMetadataPreprocessor.preserve_nb_metadata_mask={"kernelspec", ("language_info", "name")}'

"$python" -c 'from pdl_utils.settings import get_profile; print("profile:", get_profile())' || exit 1
number=0
failed=
for notebook in "$@"; do
  name=$(basename "$notebook" .ipynb)
  number=$((number + 1))
  began=$(date +%s)
  printf '[%d/%d] %s … ' "$number" "$#" "$name"
  # shellcheck disable=SC2086
  if "$python" -m nbconvert --log-level=ERROR --execute --to notebook --output-dir "$out" $plain "$kept" "$notebook"; then
    echo "ok in $(($(date +%s) - began)) s"
  else
    echo "$name failed after $(($(date +%s) - began)) s"
    failed="$failed $name"
    continue
  fi
  if [ "$folder" = --in-place ]; then
    mv "$out/$name.ipynb" "$notebook"
  else
    "$python" "$(dirname "$0")/to_html.py" "$out/$name.ipynb" "$out/$name.html"
  fi
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
