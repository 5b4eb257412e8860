# Two commands matter: `make run` and `make test`. Both need python3 (3.10 or newer), and a network for the first install.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
RUN = out/run
RECORD = --results notebooks/results --replace
PAPERMILL = TQDM_DISABLE=1 $(BIN)/papermill --cwd notebooks --log-output --no-request-save-on-cell-execute

# M, N and code of the rows; TRAIN: the float network of a data set, then these of it
SETTINGS = "1 1" "1 2 --code binary" "2 2" "2 2 --code binary" "3 3" "3 3 --code binary"
MORE_SETTINGS = "1 3 --code binary" "1 4 --code binary" "2 2 --code uniform,binary" "2 3 --code uniform,binary" "2 2 --code binary --mixed" "2 3 --code binary" "5 5" "1 3" "3 1" "1 none" "2 none" "2 none --code binary" "3 none"
CIFAR_SETTINGS = "1 1" "1 2 --code binary" "2 2 --code binary" "3 3 --code binary" "1 none" "2 none"
TRAIN = $(BIN)/python notebooks/experiment.py pretrain --dataset $(1) $(3) $(RECORD) && \
	for setting in $(2); do set -- $$setting; M=$$1; N=$$2; shift 2; \
		$(BIN)/python notebooks/experiment.py finetune --dataset $(1) --weight-bases $$M --activation-bases $$N $$@ $(3) \
		$(RECORD) || exit 1; done

.PHONY: help run test lab bench step results ablation codes writeup clean

help:
	@echo "make run      both notebooks on the scikit-learn digits, into $(RUN) (minutes)"
	@echo "make test     style and tests"
	@echo "make lab      the notebooks in the browser"
	@echo "make bench    the speed of kernels and networks, into their results/"
	@echo "make step     what a training step costs against float's, into notebooks/results (ten minutes)"
	@echo "make results  the accuracy tables, into notebooks/results, notebooks/trained and out (a day; resumes; replaces)"
	@echo "make ablation what each choice is worth, on a tenth of Fashion-MNIST, three seeds (hours)"
	@echo "make codes    what each code is worth, on a third of Fashion-MNIST, three seeds (hours)"
	@echo "make writeup  writeup/writeup.pdf"

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "abcnets needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

run: $(INSTALLED)
	@mkdir -p $(RUN)
	$(PAPERMILL) notebooks/FinalProject.ipynb $(RUN)/FinalProject.ipynb -p dataset digits -p finetune_epochs 6 -p out ../$(RUN) -p results ../$(RUN)/results
	$(PAPERMILL) notebooks/Eval.ipynb $(RUN)/Eval.ipynb -p dataset digits -p finetune_epochs 6 -p out ../$(RUN) -p results ../$(RUN)/results
	@$(BIN)/python notebooks/page.py $(RUN)/FinalProject.ipynb $(RUN)/Eval.ipynb
	@$(BIN)/python notebooks/experiment.py table --results $(RUN)/results
	@echo "Pictures: $(RUN)/figures, and in their story $(RUN)/FinalProject.html and $(RUN)/Eval.html"

test: $(INSTALLED)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks/FinalProject.ipynb

bench: $(INSTALLED)
	$(BIN)/python -m kernels.bench
	$(BIN)/python notebooks/speed.py

step: $(INSTALLED)
	for network in nine-layer resnet-20; do for bases in "3 --activation-bases 3" "2 --activation-bases 2 --code binary"; do \
		for threads in 1 2; do $(BIN)/python notebooks/experiment.py step --network $$network --threads $$threads \
		--weight-bases $$bases --results notebooks/results || exit 1; done; done; done

results: $(INSTALLED)
	for seed in 0 1 2; do $(call TRAIN,fashion-mnist,$(SETTINGS),--seed $$seed) || exit 1; done
	$(BIN)/python notebooks/experiment.py sensitivity --dataset fashion-mnist --code binary --most 4 --apart 2 --results notebooks/results
	$(call TRAIN,fashion-mnist,$(MORE_SETTINGS),)
	$(call TRAIN,cifar10-jpeg,$(CIFAR_SETTINGS),)
	for dataset in fashion-mnist cifar10-jpeg; do \
		$(BIN)/python notebooks/experiment.py collect --dataset $$dataset --results notebooks/results || exit 1; done
	$(BIN)/python notebooks/compare.py --results notebooks/results
	$(BIN)/python writeup/build.py

ablation: $(INSTALLED)
	for seed in 0 1 2; do for choice in "" --per-layer --even-shifts --learn-shifts --scale-gradient "--distill 0" "--calibrate 0"; do \
		$(BIN)/python notebooks/experiment.py finetune --dataset fashion-mnist --weight-bases 2 --activation-bases 2 \
		--calibrate 512 --limit 6000 --epochs 3 --float-seed 0 --seed $$seed $$choice \
		$(RECORD) || exit 1; done; done

codes: $(INSTALLED)
	for seed in 0 1 2; do for choice in "1 1" "1 2 --code uniform" "1 2 --code binary" "2 2" "2 2 --code binary,uniform" \
		"2 2 --code binary,thermometer --zero" "2 2 --code binary" "2 2 --code binary --no-zero" "3 3" "3 3 --zero" "3 3 --code binary" \
		"2 none" "3 none" "2 none --code binary"; do set -- $$choice; M=$$1; N=$$2; shift 2; \
		$(BIN)/python notebooks/experiment.py finetune --dataset fashion-mnist --weight-bases $$M --activation-bases $$N $$@ \
		--limit 20000 --epochs 3 --float-seed 0 --seed $$seed \
		$(RECORD) || exit 1; done; done

writeup: $(INSTALLED)
	$(BIN)/python writeup/build.py

clean:
	rm -rf $(RUN) .pytest_cache .ruff_cache .hypothesis
