from pml_tacl.trainers.unsupervised_trainer import UnsupervisedTrainer

__all__ = ["UnsupervisedTrainer"]
