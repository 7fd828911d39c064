from .reference import (distill_loss, distill_target, dopri5_error, dopri5_stage_, euler_step_, flow_training_pair,
                        group_norm_silu, noise_augment, normal, rk2_stage_, student_state, to_uint8)
