#!/usr/bin/env bash
# The commands behind the README's GPU tables and docs/performance.md, each a step of its own:
#
#   configs/reproduce_gpu.sh DATA OUT [STEP ...]        all steps in this order if none is named
#
#   steps          times of captured steps at published shapes
#   products       times of products with packed weights
#   shapes         whole decoding with random weights: Mistral-7B's and GPT-2's shape
#   train_125m     GPT-Neo-125M's shape from scratch, then on what it writes itself (5.4 minutes of training)
#   tables_125m    all peers; needs train_125m
#   more_125m      batches, float32 and quantised quality; needs train_125m
#   train_1.3b     the same at 1.3B's shape (9 minutes of training divided by GPUS, then 2 on one)
#   tables_1.3b    all peers, and four bits with streams; needs train_1.3b and train_125m
#
# DATA holds the data sets' official files; models and results go to OUT. DRY=1 prints the commands instead. Times are those of an
# H200. What is finished is not done again; a table that was cut goes on where it stopped.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$(realpath -m "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() {
    if [ -n "${DRY:-}" ]; then echo "$*"; else "$@"; fi
}

launcher=()

# Trains into the folder that its first argument names, unless a trained model is there: README.md is written last.
train() {
    local folder=$out/$1
    shift
    if [ -f "$folder/README.md" ]; then
        echo "$folder: trained already" >&2
        return
    fi
    run python "${launcher[@]}" train_spec_stream.py --data_dir "$data" --save_steps 0 --eval_steps 0 --data_weights spider=2,dialogsum=2 \
        --output_dir "$folder" "$@"
}

measure() {
    run python dataset_tps.py --output_dir "$out/results" --dtype bfloat16 --num_runs 1 --max_new_tokens 128 --no-breakdown "$@"
}

steps() { run python -m benchmark.step_times --output_dir "$out/results/steps"; }

products() { run python -m benchmark.product_times --output_dir "$out/results/products"; }

shapes() {
    local random=(--random_weights --datasets synthetic --prompt_tokens 256 --ignore_eos --model_type static,int8,int4)
    measure "${random[@]}" --model_name_or_path configs/shapes/mistral_7b --limit 3 --run_name mistral_7b_shape
    measure "${random[@]}" --model_name_or_path configs/shapes/gpt2 --limit 6 --run_name gpt2_shape
}

train_125m() {
    train base_125m --mode scratch --model_config configs/gpt_neo_125m.json --bf16 --learning_rate 4e-4 \
        --weight_decay 0.05 --warmup_steps 300 --max_train_minutes 3.2 --calibration_prompts 0
    train gpt_neo_125m --mode joint --targets own --model_name_or_path "$out/base_125m" --bf16 \
        --learning_rate 3e-4 --warmup_steps 50 --max_train_minutes 2.2 --max_new_tokens 128 --save_dtype bfloat16
}

tables_125m() {
    local model=(--data_dir "$data" --model_name_or_path "$out/gpt_neo_125m")
    measure "${model[@]}" --model_type naive,half,prompt_lookup,assisted,static,spec_stream --limit 20 \
        --assistant_model checkpoints/spec_stream_9m --run_name gpt_neo_125m
}

more_125m() {
    local model=(--data_dir "$data" --model_name_or_path "$out/gpt_neo_125m")
    measure "${model[@]}" --model_type static,spec_stream --batch_size 1,2,4,8,16,32 --limit 32 --run_name gpt_neo_125m_batches
    measure "${model[@]}" --model_type static,spec_stream --dtype float32 --limit 64 --run_name gpt_neo_125m_float32
    run python -m benchmark.quantised_quality --model_name_or_path "$out/gpt_neo_125m" --data_dir "$data" \
        --output_dir "$out/results/quantised_quality_125m" --dtype bfloat16
}

train_1.3b() {
    local large=(--bf16_weights --batch_rows 12288 --optimizer muon --adam_beta2 0.95 --save_dtype bfloat16)
    export PYTORCH_ALLOC_CONF=expandable_segments:True
    local gpus=${GPUS:-1}
    if [ "$gpus" -gt 1 ]; then
        launcher=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
    fi
    train base_1.3b "${large[@]}" --mode scratch --model_config configs/gpt_neo_1.3b.json \
        --learning_rate 2e-3 --warmup_steps 60 --max_train_minutes "$(awk "BEGIN { print 9 / $gpus }")" --calibration_prompts 0
    launcher=()
    train gpt_neo_1.3b "${large[@]}" --mode joint --targets own --model_name_or_path "$out/base_1.3b" \
        --learning_rate 1e-3 --muon_learning_rate 1e-3 --warmup_steps 20 --max_train_minutes 2 --max_new_tokens 128 \
        --calibration_prompts 48 --target_batch_size 128 --limit 3000
}

tables_1.3b() {
    local model=(--data_dir "$data" --model_name_or_path "$out/gpt_neo_1.3b")
    measure "${model[@]}" --limit 12 --assistant_model "$out/gpt_neo_125m" --run_name gpt_neo_1.3b \
        --model_type naive,static,spec_stream,int4,int4+spec_stream,half,prompt_lookup,assisted
}

all=(steps products shapes train_125m tables_125m more_125m train_1.3b tables_1.3b)
[ $# -gt 0 ] || set -- "${all[@]}"
for step in "$@"; do
    case " ${all[*]} " in
        *" $step "*) ;;
        *) echo "error: unknown step '$step'; choose from ${all[*]}." >&2; exit 2 ;;
    esac
done
for step in "$@"; do "$step"; done
