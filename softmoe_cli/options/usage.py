"""What each command says of itself, above its options."""

import textwrap

from softmoe_cli.files import RULE

HELP = """\
softmoe: train, cost and compare mixture-of-experts vision transformers

usage: softmoe COMMAND [ARGUMENTS]

  train       compose an experiment and train it
              softmoe train model=vit_nano2_soft seed=1
  finetune    the same loop, from a checkpoint
              softmoe finetune checkpoint=RUN data=digits
  settle      add seeds until every arm has its verdict, or a budget ends
              softmoe settle model/router=dense,soft margin=0.5 hours=2
  upcycle     a dense checkpoint into a mixture of experts
              softmoe upcycle checkpoint=RUN model/router=soft
  prune       a mixture of experts into a smaller one, or a plain ViT
              softmoe prune checkpoint=RUN keep=1 to=dense
  extract     one task out of a model that knows several
              softmoe extract checkpoint=RUN task=digits
  evaluate    quality of a checkpoint on a data set
              softmoe evaluate checkpoint=RUN
  export      for timm, torch.export, ONNX and the hub
              softmoe export checkpoint=RUN 'formats=[onnx]'
  cost        parameters, FLOPs, memory, latency
              softmoe cost model=vit_s16_soft
  match       make one model cost what another does
              softmoe match model=vit_s16_soft to=vit_s16_dense
  compare     runs to tables, verdicts, Pareto front, plots
              softmoe compare outputs/default
  scaling     laws fitted to runs: which experts, which size, how many images
              softmoe scaling outputs/default --train-pflop 0.5
  show        a run's page, and its routing painted on images
              softmoe show outputs/default/RUN
  check       conformance report for a router
              softmoe check soft
  data check  read a data set before a long run does
              softmoe data check data=folder data.root=PATH
  status      what runs are doing, from their files
              softmoe status outputs/default
  doctor      what is wrong with runs, from their files, and what to turn
              softmoe doctor outputs/default
  list        models with their sizes, routers, data sets, recipes, experiments
              softmoe list models --filter soft
  completion  what the Tab key completes, for bash, zsh and fish
              eval "$(softmoe completion bash)"

softmoe COMMAND --help says more; --debug shows the traceback of an error;
--json prints JSON and nothing else; --version prints the version."""

USAGE = {
    "train": """\
softmoe train [GROUP=CHOICE | KEY=VALUE]...

Composes an experiment and trains it.

  softmoe train                   a small Soft MoE on real digits, in a minute
  softmoe train model=vit_s16_soft data=folder data.root=PATH
  softmoe train model/backbone=vit_nano4 model/router=dense \\
    data=fashion_mnist train.minutes=5
  softmoe train -m model.router.num_experts=8,16,32 seed=0,1,2
                                  a sweep: every combination
  softmoe train -m seed=0,1,2 --plan
                                  list its jobs with cost and time, and stop
  softmoe train -m seed=0,1,2 hydra/launcher=slurm \\
    hydra.launcher.partition=gpu hydra.launcher.gpus=1
  softmoe train --cfg job         print the composed configuration, and stop
  softmoe train optim.layer_decay=0.7 --groups
                                  each parameter's learning rate and decay

The same configuration is the same folder: finished runs are not repeated,
stopped ones go on.""",
    "finetune": """\
softmoe finetune checkpoint=SOURCE [GROUP=CHOICE | KEY=VALUE]...

The same loop as softmoe train, from given weights.

  softmoe finetune checkpoint=outputs/default/RUN data=digits
  softmoe finetune checkpoint=weights.safetensors data=cifar10 \\
    model.image_size=64
  softmoe finetune checkpoint=timm:vit_tiny_patch16_224 data=folder \\
    data.root=PATH
  softmoe finetune checkpoint=vmoe:PATH data=cifar10   official JAX weights
  softmoe finetune checkpoint=RUN data=cifar10 recipe=finetune_adamw \\
    model.image_size=64 slots=proportional
  softmoe finetune checkpoint=RUN data=cifar10 \\
    'optim.freeze=[patch_embed.*,blocks.0.*]' --groups

SOURCE is a run folder, a .safetensors file, hf-hub:OWNER/NAME, timm:NAME or
vmoe:PATH. The model is the checkpoint's, the images are those of data= (digits
without it), the checkpoint's own set cut as it was; the head is kept only when
the classes are the same. model.image_size resamples the position table and
keeps the slots per expert; slots=proportional lets them grow with the tokens.
--groups lists each parameter's learning rate and decay, and stops. What softmoe
upcycle carried over of an optimizer's state is where the new one starts.""",
    "settle": """\
softmoe settle [GROUP=CHOICE,CHOICE | KEY=VALUE,VALUE]... [OPTION=VALUE]...

Adds seeds in rounds until every arm has its verdict, or a budget is used up.

  softmoe settle model/router=dense,soft,tokens_choice margin=0.5 hours=2
  softmoe settle model/router=dense,soft margin=0.5 --plan
                                  how many seeds and hours to expect, and stop
  softmoe settle +experiment=placement/last_1,placement/last_4 max_seeds=20
  softmoe settle model/router=dense,soft hydra/launcher=slurm \\
    hydra.launcher.partition=gpu hydra.launcher.gpus=1 format=json
  softmoe settle checkpoint=RUN adapter=none,lora,soft_moa margin=0.5

Commas make arms; all other words are those of softmoe train -m, or with
checkpoint= those of softmoe finetune -m, but seeds are settle's own business:
seed=N is the first one. The verdicts are those of softmoe compare by the
any-time rule: 95% hold for all arms and looks at once. Arms, baseline, measure
and margin are fixed before the first run. What counts is in the run folders:
the same command goes on after a stop, and with a larger budget after its end.
The exit status is 0 where every arm has its verdict and 3 where some are open.""",
    "upcycle": """\
softmoe upcycle checkpoint=SOURCE [GROUP=CHOICE | KEY=VALUE]...

Makes a mixture of experts of a dense checkpoint.

  softmoe upcycle checkpoint=outputs/default/RUN model/router=soft \\
    model.router.num_experts=16 model.moe_blocks=last_2
  softmoe upcycle checkpoint=RUN model=small model/router=experts_choice \\
    folder=upcycled               a named model with RUN's backbone
  softmoe upcycle checkpoint=timm:vit_tiny_patch16_224 data=cifar10 \\
    model/router=soft 'model.moe_blocks=[6,8,10]'
  softmoe upcycle checkpoint=timm_weights.safetensors data=cifar10 \\
    model.backbone.timm=vit_tiny_patch16_224 ...
  softmoe upcycle checkpoint=RUN model/router=tokens_choice_dropless \\
    model.router.k=2 model.router.renormalise=true \\
    model.moe_blocks=every_2 preserve=true
  softmoe finetune checkpoint=FOLDER data=...          goes on from there

SOURCE is what softmoe finetune takes. The backbone and, unless data= is given,
the images are SOURCE's. Every expert starts as a copy of the MLP that it
replaces or, with a smaller model.expert_width, as a part of one; the router
starts afresh. receipt.json, and the header of the weights, say where every
weight comes from, how much the outputs changed, loss and cost before and
after.""",
    "prune": """\
softmoe prune checkpoint=SOURCE [data=CHOICE] [KEY=VALUE]...

Makes a mixture with fewer experts, without training.

  softmoe prune checkpoint=outputs/default/RUN keep=4
  softmoe prune checkpoint=RUN keep=2 by=hit_rate images=512 folder=pruned
  softmoe prune checkpoint=RUN keep=1 by=router_change before=PRETRAINED
  softmoe prune checkpoint=RUN keep=1 to=dense         a plain ViT for timm
  softmoe prune checkpoint=RUN clock=true              of what softmoe finetune
                                  prune.keep= has left
  softmoe finetune checkpoint=FOLDER data=...          goes on from there

SOURCE is a run folder, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH.
Experts are scored on training images of data= (the checkpoint's set without
it), without their labels. With to=dense the one expert that is left in each
block becomes the block's MLP; where that would compute something else, it is
refused.
receipt.json, and the header of the weights, say which experts stay and why,
what changed on the validation images, quality and cost before and after.
softmoe evaluate reads the folder as any other. To prune while finetuning:
softmoe finetune prune.keep=1 (softmoe finetune --help prune).""",
    "extract": """\
softmoe extract checkpoint=SOURCE task=NAME [KEY=VALUE]...

Makes a smaller model of one task, or of some, out of one that was trained on
several sets (data=mix), without training. It computes the same.

  softmoe extract checkpoint=outputs/default/RUN task=digits folder=digits_only
  softmoe extract checkpoint=RUN 'task=[digits,fashion_mnist]'
  softmoe extract checkpoint=RUN task=digits form=folded   one wide expert
  softmoe extract checkpoint=RUN task=digits form=dense    a plain ViT for timm
  softmoe evaluate checkpoint=digits_only                  needs no task

SOURCE is a run folder, a .safetensors file or hf-hub:OWNER/NAME. Blocks that
decide by task (model/router=task_choice, static_tasks) keep the experts that
the task takes; others decide by what an image shows, and keep all. The head
keeps the task's classes. receipt.json, and the header of the weights, say
which experts stay, parameters before and after, and how far the outputs are
off on the task's validation and test images, of which no test label is read.
softmoe export takes the folder as any other.""",
    "evaluate": """\
softmoe evaluate checkpoint=SOURCE [data=CHOICE] [KEY=VALUE]...

Quality of a checkpoint on a data set.

  softmoe evaluate checkpoint=outputs/default/RUN
  softmoe evaluate checkpoint=weights.safetensors data=folder \\
    data.root=PATH split=test format=json
  softmoe evaluate checkpoint=RUN predictions=predictions.csv \\
    confusion=confusion.csv
  softmoe evaluate checkpoint=RUN data=digits 'fewshot=[1,5,10,25]'
                                  ridge regression on frozen features
  softmoe evaluate checkpoint=RUN 'audit=[neighbours,capacity,slots,experts]'
  softmoe evaluate 'checkpoint=[RUN,RUN]' soup=greedy  average of weights
  softmoe evaluate checkpoint=RUN 'contrast=[rank_2,random_1,skip]'
                                  self-contrast, two passes of one model

Without data= the set that the checkpoint was trained on is read; that set, by
its name and place, is cut as it was for the checkpoint, unless data.split_seed,
test_fraction or validation_fraction are typed. Few-shot quality needs no common
classes.""",
    "export": """\
softmoe export checkpoint=SOURCE [formats=[torch_export,onnx]] [KEY=VALUE]...

Writes a folder that other programs load.

  softmoe export checkpoint=outputs/default/RUN folder=exported
  softmoe export checkpoint=RUN 'formats=[torch_export,onnx]' folder=exported
  softmoe export checkpoint=RUN push=OWNER/NAME
                                  to the Hugging Face hub; hf auth login first
  softmoe evaluate checkpoint=exported
                                  the folder, or hf-hub:OWNER/NAME, is a
                                  checkpoint

The folder has the weights (model.safetensors), the hub's config.json for timm,
and the programs asked for: model.pt2 (torch.export) and model.onnx, for any
number of images. From Python, with timm and softmoe_cli installed:

  import timm, softmoe_cli.model.hub
  model = timm.create_model("local-dir:exported", pretrained=True).eval()
                                  # or "hf-hub:OWNER/NAME"
  logits = model(images)          # b c s s, normalised

What is written is read back and run on validation images; an output that
differs by more than 1e-4, or 1e-4 of the largest where outputs are above 1, is
an error and leaves nothing behind. receipt.json has the figures. Precision is
fp32. ONNX needs pip install 'softmoe-cli[onnx]'.""",
    "cost": """\
softmoe cost [GROUP=CHOICE | KEY=VALUE]...

Parameters, FLOPs and memory of a model, by formula and by counter.

  softmoe cost model=vit_h14_soft data.num_classes=1000
  softmoe cost model=vit_s16_soft batch_size=64 recompute=true precision=bf16
  softmoe cost -m model=vit_s16_dense,vit_s16_soft format=csv
                                  one table for many models
  softmoe cost model=vit_nano2_soft clock=true threads=1
                                  measured as well, on this machine

A multiply-add is 2 FLOPs. No weights are allocated unless clock=true.""",
    "match": """\
softmoe match [GROUP=CHOICE | KEY=VALUE]... free=KEY to=MODEL by=COST

The value of KEY with which the costs are equal.

  softmoe match model=vit_s16_soft to=vit_s16_dense by=forward_gflop \\
    free=model.router.num_experts
  softmoe match model=vit_nano2_soft to=vit_nano2_tokens_choice \\
    by=latency_ms free=model.router.slots_per_expert
  softmoe match model=vit_s16_soft to=vit_s16_dense by=train_pflop \\
    steps=300000 free=train.steps

Prints the overrides to use and how close they come. Where nothing comes within
tolerance it names the nearest on both sides and the exit status is 1.""",
    "compare": """\
softmoe compare FOLDER... [--OPTION VALUE]...

Finished runs to tables, verdicts, a Pareto front and plots.

  softmoe compare outputs/expert_count
  softmoe compare outputs/expert_count --quality loss --cost device_s \\
    --columns num_experts,peak_mib --sort num_experts
  softmoe compare outputs/a outputs/b --where router=soft,dense \\
    --by router,num_experts --baseline num_experts=8
  softmoe compare outputs/expert_count --at train_pflop=0.002,0.004 \\
    --at device_s --reference pareto --wandb

Reads result.json and metrics.jsonl of every run below the folders. Runs that
differ in nothing but the seed are a group: mean, 95% interval and n; difference
from the baseline and whether it is distinguishable; quality at equal cost; the
Pareto front and how sure it is. Runs on other images are kept apart; what
cannot be read is named and left out.""",
    "scaling": """\
softmoe scaling FOLDER... [--OPTION VALUE]...

Laws of quality against size, experts and images, fitted to finished runs, and
the decision that they imply.

  softmoe scaling outputs/scaling_small
                                  every law that the runs identify, with its
                                  error on runs that were held out
  softmoe scaling outputs/scaling_small --train-pflop 0.5
                                  the best experts, size and images for that
  softmoe scaling outputs/scaling_small --device-s 3600 --costs costs.json \\
    --latency-ms 4 --experts 4,16,32
  softmoe scaling outputs/scaling_small --loss 0.3 --served 1e9 --next
                                  cheapest to train and to serve a billion
  softmoe scaling outputs/scaling_small --check RUN
  softmoe scaling --published all

Needs three sizes, three numbers of images and of experts at least, better four
sizes, and three seeds. Every answer has its interval and says how far beyond
the runs it lies; beyond ten times it is refused. The exit status is 1 where no
law beats predictors without a law on the dearest runs.""",
    "show": """\
softmoe show RUN [image=FILE | split=validation] [KEY=VALUE]...

A run's page, which opens in any browser, and its pictures: curves, cost,
settings, routing over training, calibration, confusion, the worst images; for
each layer of experts who takes which patch, what each expert likes, and where
it is at work in the images of a class.

  softmoe show outputs/default/RUN
  softmoe show RUN image=cat.jpg  the routing of your own image
  softmoe show RUN split=test images=2000 painted=8 folder=pictures
  softmoe show RUN --follow       while it trains: serves the page on this
                                  machine, renews it, and ends with the run
  softmoe show RUN --wandb        the same pictures on Weights & Biases
  softmoe show RUN --json         where the files are

A run may be going on, stopped or done; without a checkpoint there is no routing
to paint, and the page says so. The images are the checkpoint's own unless data=
names others.""",
    "check": """\
softmoe check ROUTER [KEY=VALUE]...

What every router must keep, measured; exit status 1 if anything fails.

  softmoe check tokens_choice k=2 images_per_group=4
  softmoe check my_router.py num_experts=8
                                  a file of one's own with one subclass of
                                  Router

ROUTER is a name from softmoe list, a name in your own conf/model/router, or a
Python file. KEY=VALUE are its options. SOFTMOE_VECTORS names another folder of
official numbers.""",
    "data": """\
softmoe data check [data=CHOICE] [KEY=VALUE]...

Reads a data set before a long run does; exit status 1 if it is faulty.

  softmoe data check data=folder data.root=PATH
  softmoe data check data=webdataset data.root=PATH data.workers=8 format=json

Faults: files that cannot be read, empty classes, classes that not every part
has, the same pixels in two of train, validation and test or under two labels.
It counts images by class, sizes, and repetitions in a part.""",
    "status": """\
softmoe status [FOLDER...] [--json]

What runs are doing, from their files alone, here or on another machine.

  softmoe status                  all of outputs, what wrote last first
  softmoe status outputs/expert_count
                                  a study, a sweep-* folder in it, or one run

done; running; stopped, with what to type to go on; failed, with the reason;
waiting; damaged, with the file. Runs of another machine that have neither ended
nor stopped are "running or killed": the age of the last row tells which.""",
    "doctor": """\
softmoe doctor RUN|FOLDER... [--json]

What is wrong with runs, from their files alone: each finding with what was
measured, the limit, and the options to turn.

  softmoe doctor outputs/default/RUN
  softmoe doctor outputs/expert_count       a study, or a sweep-* folder in it
  softmoe doctor outputs/default --json     every figure, limit and its source

Looks for runs that did not finish, are at chance or diverged; loss spikes,
weights that barely moved, a loss that still falls; too few images, too small a
model; dead, collapsed or equal experts, equal slots, dropped tokens, routing
that is saturated or never left its start; time lost in loading, evaluation,
saving or compilation; a precision that the processor was slow at. What could
not be looked at is said. The exit status is 1 where anything was found and 0
where all runs are healthy.""",
    "list": """\
softmoe list [WHAT] [--filter WORD]

What can be chosen, a line each; models with tokens, parameters and FLOPs.

  softmoe list
  softmoe list models --filter soft
  softmoe list routers            models, backbones, routers, data, recipes,
                                  experiments, searches or launchers

FLOPs are those of an image's forward pass, of px by px pixels in three colours,
with 1,000 classes at 224 pixels and 10 below. What lies in a conf folder of the
working directory is listed too; softmoe cost says what such a model takes.""",
    "completion": """\
softmoe completion bash|zsh|fish

Prints what makes the Tab key complete commands, groups, keys, choices and
folders of runs. In ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish:

  eval "$(softmoe completion bash)"
  eval "$(softmoe completion zsh)"
  softmoe completion fish | source""",
}

for _command in ("evaluate", "export", "extract", "prune", "upcycle"):
    USAGE[_command] += f"\n{textwrap.fill(RULE, 80)}"
USAGE["compare"] += f"\n{textwrap.fill(f'{RULE} Only a folder that softmoe compare made is made anew.', 80)}"
USAGE["show"] += f"\n{textwrap.fill(f'{RULE} Only a folder that softmoe show made is made anew.', 80)}"
USAGE["scaling"] += f"\n{textwrap.fill(f'{RULE} Only a folder that softmoe scaling made is made anew.', 80)}"

COMMANDS = tuple(USAGE)
